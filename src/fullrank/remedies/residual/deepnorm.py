"""DeepNorm: a stronger skip under the norm, and smaller first weights."""

from __future__ import annotations

from collections.abc import Iterator

from fullrank.capture.weights import Weight
from fullrank.edit import Edit, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import Weighted, added_otherwise
from fullrank.remedies.residual.norm_changes import placement
from fullrank.remedies.weighing import scale_weights

__all__ = ["deepnorm", "deepnorm_constants"]


def deepnorm_constants(depth: int, other: int | None = None, *, decoder: bool = False) -> tuple[float, float]:
    """α and the divisor of weights.

    Alone: α = (2L)^¼, divisor (8L)^¼. Of an encoder of N blocks with a decoder of M: α = 0.81 (N⁴M)^(1/16), divisor
    (N⁴M)^(1/16)/1.15; of the decoder: α = (3M)^¼, divisor (12M)^¼.

    Args:
        depth: blocks of the stack.
        other: blocks of the other stack of an encoder-decoder; None for a stack alone.
        decoder: whether the stack is the decoder of the two.

    Returns:
        Both.
    """
    if other is None:
        return (2 * depth) ** 0.25, (8 * depth) ** 0.25
    if decoder:
        return (3 * depth) ** 0.25, (12 * depth) ** 0.25
    both = (depth**4 * other) ** (1 / 16)
    return 0.81 * both, both / 1.15


@remedy(
    "deepnorm",
    "a stronger skip under the norm, and smaller first weights",
    addresses=("rank-collapse-depth", "vanishing-or-exploding", "query-key-starvation"),
    acts_on="residual",
    exactness="init-only",
    formula="X ← N(αX + F(X)), W_V, W_O, W_up, W_down ← W/b; a stack alone: α = (2L)^¼, b = (8L)^¼; encoder of N "
    "blocks with a decoder of M: α = 0.81(N⁴M)^(1/16), b = (N⁴M)^(1/16)/1.15; its decoder: α = (3M)^¼, b = (12M)^¼",
    papers=("DeepNorm, released code microsoft/torchscale (encoder.py, decoder.py)",),
    keys=("residual_scaling",),
    parameters=(
        Parameter("alpha", "α; none for the rule", None, above=0.0, high=1e3, optional=True),
        Parameter("weights", "whether weights are divided", True, kind="switch"),
    ),
    limits=(
        "For models with a norm after the sum (post-norm), with fresh weights; others are refused.",
        "The divisors are for weights as the released code draws them (Xavier).",
        "Of gated MLPs the gate stays as it is: the rule says nothing of it.",
        "A start that is healthy is not enough: a language model of 1B parameters with it diverged in the tables of "
        "LayerNorm Scaling.",
        "Read in code only.",
    ),
    cost="one product per branch; no parameters",
)
def deepnorm(patient: Patient, *, alpha: float | None = None, weights: bool = True) -> Edit:
    """Strengthen the skips, divide W_V, W_O, W_up and W_down."""
    stacks = {stack.name: stack for stack in patient.anatomy.stacks}
    crossing = {name for name, stack in stacks.items() if any(p.startswith("cross") for c in stack.calls for p in c)}
    constants: dict[str, tuple[float, float]] = {}
    for name, stack in stacks.items():
        found = placement(patient, name)
        if found != "post":
            raise RemedyError(
                f"deepnorm is for norms after the sum, and those of {name} of this {type(patient.model).__name__} "
                f"stand otherwise ({found}); use residual-scale or scaled-init."
            )
        others = [len(one.paths) for other, one in stacks.items() if (other in crossing) != (name in crossing)]
        other = others[0] if len(stacks) == 2 and others else None
        constants[name] = deepnorm_constants(len(stack.paths), other, decoder=name in crossing)

    def factor(stack: str, layer: int, weight: Weight) -> float:
        return 1 / constants[stack][1]

    def edits() -> Iterator[Edit]:
        yield from added_otherwise(
            patient, "deepnorm", lambda branch: Weighted(alpha or constants[branch.stack][0], 1.0)
        )
        if weights:
            yield scale_weights(patient, factor, "v", "o", "up", "down")

    return together(edits())
