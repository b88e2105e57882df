"""The position-gated output projection, also the gate of gated attention: each head times what its token says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fullrank.edit import Call, Edit
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["PositionGate", "position_gate"]

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "double-sigmoid": lambda z: 2 * torch.sigmoid(z),
    "one-plus-tanh": lambda z: 1 + torch.tanh(z),
    "sigmoid": torch.sigmoid,
}


class PositionGate(nn.Module):
    """O_h(t) ← g_h(t) O_h(t), g(t) = φ(W_g x(t) + b), x the token that asks, as the attention module is given it.

    Args:
        width: of x.
        heads: how many.
        each: 1 for a gate per head, the width of a head's values for one per entry.
        phi: which φ.
        bias: whether there is a b.
    """

    def __init__(self, width: int, heads: int, each: int, phi: str, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads * each, width))
        self.bias = nn.Parameter(torch.zeros(heads * each)) if bias else None
        self.heads, self.each, self.phi = heads, each, phi

    def forward(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width), gated."""
        x = call.input
        if x is None or x.shape[:2] != (output.shape[0], output.shape[2]):
            found = "nothing" if x is None else tuple(x.shape)
            raise EditError(
                f"attention in {call.place.path} cannot be gated by its tokens: it was given {found}, and its heads "
                f"return {tuple(output.shape)}."
            )
        z = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        g = _GATES[self.phi](z).unflatten(-1, (self.heads, self.each)).transpose(1, 2)
        gated: Tensor = output * g.to(output.dtype)
        return gated


@remedy(
    "position-gate",
    "each head's output times a gate that its token opens",
    addresses=("sinks", "averaging-heads", "redundant-heads", "context-dilution"),
    acts_on="attention",
    exactness="identity-now",
    formula="y(t) = Σ_h g_h(t) O_h(t) W_O^h, g(t) = φ(W_g x(t) + b), φ = 2σ, W_g = 0, b = 0 at first",
    papers=(
        "Cirrincione: Rank, Head-Channel Non-Identifiability, and Symmetry Breaking …, arXiv 2604.23681 (PG-OP)",
        "Qiu et al.: Gated Attention for Large Language Models, NeurIPS 2025, arXiv 2505.06708",
    ),
    keys=("head_channel", "oversmoothing_fixes"),
    parameters=(
        Parameter(
            "kind",
            "one gate for each head, or one for each entry of its output",
            "head-wise",
            kind="choice",
            choices=("head-wise", "element-wise"),
        ),
        Parameter(
            "phi",
            "φ: 2σ and 1 + tanh begin at 1; σ, that of gated attention, at ½",
            "double-sigmoid",
            kind="choice",
            choices=tuple(_GATES),
        ),
        Parameter("bias", "whether there is a b", True, kind="switch"),
    ),
    limits=(
        "Does nothing until it is trained; with φ = σ every head is halved at once.",
        "The position-gated output projection was read in an abstract only: its equation is inferred from the overhead "
        "it states; gated attention's was read in code.",
        "The gate reads what the module that attends is given: after the norm in pre-norm models, before it in "
        "post-norm.",
        "It does not make heads identifiable from what the projection returns: the kernel keeps its dimension.",
    ),
    cost=(
        "head-wise 1/d_k of the output projection, in time and parameters; element-wise as much as all of it where "
        "heads fill the width; fused kernels stay"
    ),
)
def position_gate(patient: Patient, *, kind: str = "head-wise", phi: str = "double-sigmoid", bias: bool = True) -> Edit:
    """Put a gate on the heads of every self-attention."""
    blind = [site.path for site in patient.self_attention if site.first.input_width is None]
    if blind:
        raise RemedyError(
            f"position-gate needs the tokens that ask, and {blind[0]} is given no stream to read them from; use a gain "
            "that needs none, such as attn-scale."
        )

    def make(site: Site) -> PositionGate:
        seen = site.first
        assert seen.input_width is not None
        each = 1 if kind == "head-wise" else seen.value_width
        return PositionGate(seen.input_width, seen.heads, each, phi, bias=bias)

    return patient.rewrite("position-gate", after=make)
