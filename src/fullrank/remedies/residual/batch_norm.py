"""Batch norm in the place of norms of tokens: each feature over all real tokens of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.capture.layout import Layout
from fullrank.edit import Edit, replace_module, together
from fullrank.edit.places import module_at
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.norm_affine import OtherNorm, moments, refuse_other
from fullrank.remedies.residual.norm_changes import norms_in
from fullrank.remedies.residual.padding import Padding, padding_of

__all__ = ["TokenBatchNorm", "batch_norm"]


class TokenBatchNorm(OtherNorm):
    """y = γ ⊙ (x − mean)/√(variance + ε) + β, with moments of each feature over all real tokens of all sequences.

    In training those of the batch, which move the running ones; in evaluation the running ones.

    Args:
        width: features.
        layout: of the stream.
        stack: its name.
        padding: which tokens are real.
        momentum: weight of a batch in the running moments.
        eps: ε.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, layout: Layout, stack: str, padding: Padding, momentum: float, eps: float) -> None:
        super().__init__(width, layout)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.stack, self.padding, self.momentum, self.eps = stack, padding, momentum, eps
        self.catching = False
        self.caught: tuple[Tensor, Tensor] | None = None

    def forward(self, run: Callable[..., Any], state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The state, normalised."""
        gain, shift = self.affine(run, state)

        def f(X: Tensor) -> Tensor:
            Y = X.to(gain.dtype)
            if self.training or self.catching:
                real = self.padding.real(self.stack, X)
                mean, variance = moments(Y, real, (0, 1))
                if self.catching:
                    self.caught = (mean.flatten(), variance.flatten())
                else:
                    with torch.no_grad():
                        self.mean.lerp_(mean.flatten().to(self.mean.dtype), self.momentum)
                        self.variance.lerp_(variance.flatten().to(self.variance.dtype), self.momentum)
            else:
                mean, variance = self.mean.to(gain.dtype), self.variance.to(gain.dtype)
            return (gain * (Y - mean) * torch.rsqrt(variance + self.eps) + shift).to(X.dtype)

        return self.rewritten(state, f)


@remedy(
    "batch-norm",
    "batch norm in the place of norms of tokens",
    addresses=("rank-collapse-depth",),
    acts_on="norm",
    exactness="changes-function",
    formula="N(x) ← γ ⊙ (x − m)/√(v + ε) + β; m and v of each feature over all real tokens of the batch in training, "
    "running ones in evaluation; γ and β those of the norm",
    papers=(
        "Daneshmand et al.: Batch normalization provably avoids rank collapse, NeurIPS 2020, arXiv 2003.01652",
        "Daneshmand, Joudaki, Bach: arXiv 2106.03970",
    ),
    keys=("batchnorm",),
    parameters=(
        Parameter("momentum", "weight of a batch in the running moments", 0.1, above=0.0, high=1.0),
        Parameter("eps", "ε", 1e-5, low=0.0, high=1.0),
        Parameter("final", "whether the norm after the last block is replaced too", True, kind="switch"),
    ),
    limits=(
        "The theory is of linear networks without attention; in a transformer it takes out what all tokens have in "
        "common before each branch, or after each sum.",
        "In training the answer for a sequence depends on the others of the batch, and in causal models on later "
        "tokens, through the moments; in evaluation it does not.",
        "The running moments begin as those of the batch that the model is repaired with. They are buffers and saved.",
        "Padding is told from the argument of the model that says what attention may see: repair with a padded batch "
        "where padded ones will come.",
        "Moments are of one process; activation checkpointing moves the running ones twice per step.",
    ),
    cost="as a norm of tokens; two buffers per norm and feature; no parameters",
)
def batch_norm(patient: Patient, *, momentum: float = 0.1, eps: float = 1e-5, final: bool = True) -> Edit:
    """Replace norms of tokens."""
    roles = ("read", "sum", "branch", "final") if final else ("read", "sum", "branch")
    found = norms_in(patient, *roles, why="batch-norm takes the place of norms")
    padding, telling = padding_of(patient)
    made: dict[str, TokenBatchNorm] = {}
    for path, norms in found.items():
        layout = refuse_other(patient, norms, "batch-norm")
        module = TokenBatchNorm(norms[0].width, layout, norms[0].stack, padding, momentum, eps)
        made[path] = module.placed(module_at(patient.model, path))

    def edits() -> Iterator[Edit]:
        yield from telling()
        for path, module in made.items():
            yield replace_module(patient.model, path, module, name="fullrank_batch_norm")

    edit = together(edits())
    with edit.kept():
        _begin(patient, list(made.values()))
    return edit


@torch.no_grad()
def _begin(patient: Patient, modules: list[TokenBatchNorm]) -> None:
    """Running moments as those of the batch at hand, each layer reading what those before it make with theirs."""
    for module in modules:
        module.catching = True
    try:
        with undisturbed(patient.model):
            patient.forward()
    finally:
        for module in modules:
            module.catching = False
    for module in modules:
        if module.caught is not None:
            module.mean.copy_(module.caught[0])
            module.variance.copy_(module.caught[1])
            module.caught = None
