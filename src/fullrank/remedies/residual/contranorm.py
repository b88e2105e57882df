"""ContraNorm: what each block hands on is pushed away from the tokens it is like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.edit import Call, Edit, rewrite_attention, rewrite_block, together
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["ContraNorm", "contranorm"]


class Seen:
    """Which tokens see which, as the attention of a block is told; changes nothing."""

    def __init__(self) -> None:
        self.visible: Tensor | None = None
        self.causal = False
        self.tokens = (0, 0, 0)

    def __call__(self, call: Call) -> Call:
        """Note what the call says."""
        flags = call.logits is None and call.mask is None and call.window is None
        visible = None if flags else call.visible()
        if visible is not None and visible.shape[1] > 1:
            visible = visible.any(1, keepdim=True)
        self.visible, self.causal = visible, flags and call.causal
        self.tokens = (call.value.shape[0], call.queries, call.keys)
        return call


class ContraNorm:
    """Y ← Y − s·softmax(ŶŶᵀ)Y over what each token sees, with the rows of Ŷ at length 1.

    Args:
        seen: which those are.
        scale: s.
    """

    def __init__(self, seen: Seen, scale: float) -> None:
        self.seen, self.scale = seen, scale

    def __call__(self, X: Tensor, Y: Tensor) -> Tensor:
        """The new state.

        Returns:
            (sequences, tokens, width).

        Raises:
            EditError: where attention of the block was not over the tokens of the stream and nothing else.
        """
        sequences, tokens = Y.shape[:2]
        if self.seen.tokens != (sequences, tokens, tokens):
            raise EditError(
                f"contranorm compares the {tokens} tokens of the stream, and attention saw {self.seen.tokens[2]} keys "
                f"in {self.seen.tokens[0]} sequences for {sequences}: it does not go with caches or windows apart."
            )
        directions = functional.normalize(Y.to(torch.promote_types(Y.dtype, torch.float32)), dim=-1).to(Y.dtype)
        visible = self.seen.visible
        if visible is not None:  # a padding token sees itself at least: rows without a key are not the same everywhere
            visible = visible | torch.eye(tokens, dtype=torch.bool, device=Y.device)
        Q, V = directions.unsqueeze(1), Y.unsqueeze(1)
        with torch._C.DisableTorchFunction():  # it is no attention of the model: who looks for that must not find it
            mean = functional.scaled_dot_product_attention(
                Q, Q, V, attn_mask=visible, is_causal=self.seen.causal and visible is None, scale=1.0
            )
        return Y + -self.scale * mean.squeeze(1)


@remedy(
    "contranorm",
    "tokens pushed away from those they are like",
    addresses=("rank-collapse-depth",),
    acts_on="stream",
    exactness="changes-function",
    formula="X ← X − s·softmax(X̂X̂ᵀ)X on what each block hands on; rows of X̂ at length 1; over the tokens that "
    "each sees",
    papers=("Guo et al.: ContraNorm, ICLR 2023; released code PKU-ML/ContraNorm",),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("scale", "s", 0.1, above=0.0, high=2.0),),
    limits=(
        "Cosines lie between −1 and 1: the softmax is close to uniform, and what is taken away is close to the mean.",
        "What is taken away is the same in every block: at s near 1 little is left of what tokens have in common, "
        "which a trained model needs. Small s on trained models is untested.",
        "A token is compared with those that attention sees in the same block: earlier ones in causal models, no "
        "padding. Caches of keys and values hold no states, so that text cannot be generated with them.",
        "Blocks without self-attention are refused. Remedies of branches and norms have to be applied before it: what "
        "a block adds is not followed through it.",
        "Read in code only; one copy has no temperature, and that is what is built.",
    ),
    cost="one attention call of a single head as wide as the stream per block: O(T²) time, O(T) memory where a fused "
    "kernel takes heads of that width; no parameters",
)
def contranorm(patient: Patient, *, scale: float = 0.1) -> Edit:
    """Push tokens apart after every block."""
    model, anatomy = patient.model, patient.anatomy

    def edits() -> Iterator[Edit]:
        for stack in anatomy.stacks:
            for layer, calls in enumerate(stack.calls, 1):
                part = next((one for one in calls if not one.startswith("cross")), None)
                if part is None:
                    raise RemedyError(
                        f"block {layer} of {stack.name} of this {type(model).__name__} has no self-attention that says "
                        "which tokens see which."
                    )
                seen = Seen()
                yield rewrite_attention(model, anatomy, before=seen, stack=stack.name, layer=layer, part=part)
                yield rewrite_block(model, anatomy, ContraNorm(seen, scale), stack=stack.name, layer=layer)

    edit = together(edits())
    if not edit.in_force:
        raise RemedyError(f"this {type(model).__name__} has no blocks.")
    return edit
