"""Every threshold of every verdict, with its reason: there are no others in this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["THRESHOLDS", "Threshold", "effect_limits", "threshold"]


@dataclass(frozen=True)
class Threshold:
    """A limit beyond which a number is held against a model.

    Attributes:
        name: `dead-depth.update_share`: the failure, then what is limited.
        value: the limit.
        unit: of the number, in words.
        reason: where the limit comes from.
    """

    name: str
    value: float
    unit: str
    reason: str


def threshold(name: str) -> float:
    """The value of a threshold."""
    return THRESHOLDS[name].value


def effect_limits() -> tuple[tuple[str, float], ...]:
    """What counts as an effect of an intervention, by outcome."""
    return tuple((name.removeprefix("effect."), one.value) for name, one in THRESHOLDS.items() if name[:7] == "effect.")


_ALL: Final = (
    Threshold(
        "effect.loss",
        0.01,
        "nats of loss",
        "a hundredth of a nat is within the noise of the last steps of a run",
    ),
    Threshold("effect.distribution", 0.01, "nats of KL", "the same, of the output distribution"),
    Threshold(
        "effect.state",
        0.01,
        "share of the final state's variance",
        "a hundredth of the variance over tokens and documents: a probe on the state would lose as little",
    ),
    Threshold(
        "dead-depth.update_share",
        0.05,
        "share of the stream's size",
        "a few percent: every block of the pretrained encoder writes 49 % and more, of GPT-2 at its initialisation "
        "25 %; the number alone is a note, the verdict is the intervention's",
    ),
    Threshold(
        "dead-depth.blocks",
        1 / 3,
        "share of the stack's blocks",
        "with a third of its blocks free to skip, a model is another, shallower one",
    ),
    Threshold(
        "rank-collapse-depth.token_energy",
        0.01,
        "share of the stream's energy",
        "cosine .99 between tokens of equal size; a shared bias alone does not count: see the cosine of standardised "
        "features",
    ),
    Threshold(
        "rank-collapse-depth.token_energy_alone",
        1e-3,
        "share of the stream's energy",
        "cosine .999, whoever shares the rest: gradients of queries and keys fall as (1 − ρ)² (noci), here to 1e-6; a "
        "post-norm model of ρ .995 still trains at small learning rates, one of ρ 1.000 not on a task of tokens",
    ),
    Threshold(
        "rank-collapse-depth.fall",
        0.1,
        "of the share before the first block, and of the initialisation's",
        "a tenth: what the input or the architecture has at its initialisation is no collapse in depth",
    ),
    Threshold(
        "rank-collapse-depth.similarity_standardized",
        0.5,
        "mean cosine of standardised features",
        "half of what is left without shared bias and rogue dimensions belongs to the sequence; the pretrained encoder "
        "ends at .15 to .24",
    ),
    Threshold(
        "rank-collapse-depth.channel_entropy",
        0.5,
        "of 1",
        "below it a few channels hold nearly all energy, and their share says nothing on the other ones",
    ),
    Threshold(
        "vanishing-or-exploding.total",
        1e3,
        "times, beyond the reference",
        "pretrained decoders grow a hundredfold over depth and work; a stream that grows a thousandfold beyond its "
        "initialisation hides what later blocks write",
    ),
    Threshold(
        "vanishing-or-exploding.grave",
        1e6,
        "times, beyond the reference",
        "what float32 resolves beside 1 is 1e-7: what early or late blocks say is then lost in the other's rounding",
    ),
    Threshold(
        "numerics.distinct_at_dtype",
        0.01,
        "of the pairs of tokens lost since an earlier layer",
        "one pair in a hundred: more than repeated words at the same place of two lists; healthy models lose none",
    ),
    Threshold(
        "numerics.distinct_at_dtype.grave",
        0.5,
        "of the pairs of tokens lost since an earlier layer",
        "most tokens are one number",
    ),
    Threshold(
        "numerics.margin",
        4.0,
        "times the largest entry",
        "two doublings: another batch, or the inside of a block, is easily four times what is seen in the stream",
    ),
)

THRESHOLDS: Final[dict[str, Threshold]] = {one.name: one for one in _ALL}
