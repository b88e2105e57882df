"""Holistic norm: one mean and one size for all tokens and channels of a sample, given back to what a branch adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.capture.layout import Layout
from fullrank.edit import Branch, Edit, replace_module, together
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import added_otherwise
from fullrank.remedies.residual.norm_affine import OtherNorm, moments, refuse_other
from fullrank.remedies.residual.norm_changes import norms_in, placement
from fullrank.remedies.residual.padding import Padding, padding_of

__all__ = ["HolisticNorm", "holistic_norm"]


class Size:
    """Mean and √(variance + ε) over the real tokens and all channels of each sample.

    Args:
        stack: name of the stack.
        padding: which tokens are real.
        eps: ε.
    """

    def __init__(self, stack: str, padding: Padding, eps: float) -> None:
        self.stack, self.padding, self.eps = stack, padding, eps

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Both (sequences, 1, 1), in float32 or wider."""
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        mean, variance = moments(wide, self.padding.real(self.stack, X), (1, 2))
        return mean, (variance + self.eps).sqrt()


class HolisticNorm(OtherNorm):
    """y = γ ⊙ (x − mean)/std + β.

    Args:
        width: features.
        layout: of the stream.
        size: gives mean and std; None for y = γ ⊙ x + β.
    """

    def __init__(self, width: int, layout: Layout, size: Size | None) -> None:
        super().__init__(width, layout)
        self.size = size
        self.caught: Tensor | None = None
        self.catching = False

    def forward(self, run: Callable[..., Any], state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The state, normalised."""
        gain, shift = self.affine(run, state)

        def f(X: Tensor) -> Tensor:
            Y = X.to(gain.dtype)
            if self.size is not None:
                mean, std = self.size(X)
                Y = (Y - mean) / std
                if self.catching:
                    self.caught = std
            return (gain * Y + shift).to(X.dtype)

        return self.rewritten(state, f)


class Resized:
    """X, F → X + std(X)·F.

    Args:
        size: gives std.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.caught: Tensor | None = None
        self.catching = False

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        """The new state."""
        _, std = self.size(X)
        if self.catching:
            self.caught = std
        return X + (std * F).to(X.dtype)


@remedy(
    "holistic-norm",
    "one size for all tokens of a sample",
    addresses=("numerics",),
    acts_on="norm",
    exactness="changes-function",
    formula="X ← X + std(X)·F(γ ⊙ (X − mean(X))/std(X) + β), moments over all real tokens and channels of a sample; "
    "the norm after the last block ← γ ⊙ X + β",
    papers=("Lee, Hyun, Jun, Heo: i-LN, arXiv 2504.06629; released code 2minkyulee/i-LN",),
    keys=("layernorm_restoration",),
    parameters=(
        Parameter("eps", "added to the variance", 1e-5, low=0.0, high=1.0),
        Parameter("final", "whether the norm after the last block is left out too", True, kind="switch"),
    ),
    limits=(
        "For models whose branches read through a norm (pre-norm) and see all tokens: in causal ones the moments would "
        "look ahead, and they are refused.",
        "For the restoration of images; of other tasks nothing is known.",
        "To be trained from here: a trained model has learnt to read tokens of one size each.",
        "Branches add in proportion to the stream: at initialisation it grows geometrically with depth, and tokens "
        "become alike sooner than with norms of tokens.",
        "Padding is told from the argument of the model that says what attention may see: repair with a padded batch "
        "where padded ones will come.",
        "Read in code and abstract only.",
    ),
    cost="as a norm of tokens, twice; no parameters: γ and β are those of the norm",
)
def holistic_norm(patient: Patient, *, eps: float = 1e-5, final: bool = True) -> Edit:
    """Replace norms, and resize what branches add."""
    name = type(patient.model).__name__
    for stack in patient.anatomy.stacks:
        if stack.causal:
            raise RemedyError(f"{stack.name} of this {name} is causal, and moments over all tokens would look ahead.")
        found = placement(patient, stack.name)
        if found != "pre":
            raise RemedyError(
                f"holistic-norm is for branches that read through a norm, and the norms of {stack.name} of this {name} "
                f"stand otherwise ({found})."
            )
    roles = ("read", "final") if final else ("read",)
    norms = norms_in(patient, *roles, why="holistic-norm takes the place of norms")
    padding, telling = padding_of(patient)
    made: dict[str, HolisticNorm] = {}
    for path, mine in norms.items():
        layout = refuse_other(patient, mine, "holistic-norm")
        size = None if mine[0].role == "final" else Size(mine[0].stack, padding, eps)
        made[path] = HolisticNorm(mine[0].width, layout, size).placed(module_at(patient.model, path))
    resized: dict[tuple[str, int, str], Resized] = {}

    def function(branch: Branch) -> Resized:
        one = Resized(Size(branch.stack, padding, eps))
        resized[branch.stack, branch.layer, branch.name] = one
        return one

    def edits() -> Iterator[Edit]:
        yield from telling()
        for path, module in made.items():
            yield replace_module(patient.model, path, module, name="fullrank_holistic_norm")
        yield from added_otherwise(patient, "holistic-norm", function)

    edit = together(edits())
    with edit.kept():
        _check(patient, norms, made, resized)
    return edit


def _check(patient: Patient, norms: Any, made: Any, resized: dict[tuple[str, int, str], Resized]) -> None:
    """What a branch reads must be what it is added to: only then is std of the one that of the other."""
    both = [*made.values(), *resized.values()]
    for one in both:
        one.catching = True
    try:
        with undisturbed(patient.model), torch.no_grad():
            patient.forward()
        for path, mine in norms.items():
            for norm in mine:
                other = resized.get((norm.stack, norm.layer, norm.branch))
                if other is None or other.caught is None:
                    continue
                if not torch.equal(made[path].caught, other.caught):
                    raise RemedyError(
                        f"{norm.branch} of {norm.stack} layer {norm.layer} reads another state than it is added to, "
                        "and holistic-norm needs the size of one."
                    )
    finally:
        for one in both:
            one.catching, one.caught = False, None
