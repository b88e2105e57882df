"""Whether weights look trained or fresh: beside what the same architecture is initialised with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fullrank.diagnosis.initialisation import base_parameters
from fullrank.diagnosis.thresholds import threshold
from fullrank.report.verdict import Weights

__all__ = ["freshness"]

_MOST = 2**18  # numbers of a tensor that are read for its spread; all of them for whether it is constant
_SHAPES = (0.0, -1.2, -0.6344)  # excess kurtosis of the normal, the uniform, and the normal cut off at two deviations


class _Sign(NamedTuple):
    """What one tensor shows; where it is constant in the reference, at which value."""

    kind: Literal["at its start", "set", "moved", "alike", "otherwise", "no draw"]
    start: float | None = None


def freshness(model: nn.Module, twin: nn.Module | None, *, told: bool | None = None) -> tuple[Weights, str]:
    """Whether weights are trained, and how that is known.

    What the loader knows is believed. Else every parameter is compared with its own in a reference at initialisation:

    - one that is constant there (scales of norms, biases) has *moved* where its entries differ from each other; another
      constant is somebody's choice, and says nothing;
    - of any other with at least `freshness.fewest` entries, the standard deviation s and the excess kurtosis k: it was
      drawn *otherwise* where |ln s − ln s₀| is more than `freshness.deviation` standard errors √((k̄+2)/2n), k̄ the mean
      of both kurtoses, n entries each; it is *no draw* where k is further than so many standard errors √(24/n) from the
      reference's k₀ (√2 of them) and from what the normal, the uniform and the truncated normal distribution have,
      unless k₀ is above `freshness.heavy`. Of large tensors at most 2¹⁹ entries, evenly spaced, are read for this.

    Trained: at least `freshness.share` of the constants have moved, or, where none has, at least that share of the
    others are no draw. Fresh: no constant has moved, that share is not reached, and either every spread is the
    architecture's own or there are constants to show that the others were only drawn with another spread.

    Args:
        model: without wrappers.
        twin: the same architecture at its own random initialisation; None where there is none.
        told: whether the weights are fresh, where whoever loaded them knows.

    Returns:
        `trained`, `fresh` or `unknown`, and one sentence.
    """
    signs = [] if twin is None else list(_signs(model, twin))
    seen, because = _judged(signs)
    if told is not None:
        loaded = "they were drawn at random when the model was built" if told else "they were read from a checkpoint"
        said: Weights = "fresh" if told else "trained"
        against = seen not in ("unknown", said)
        return said, f"{loaded}, though {because}." if against else f"{loaded}."
    if twin is None:
        return (
            "unknown",
            "they were passed as they are, and there is no reference at initialisation to compare them with.",
        )
    return seen, f"{because}."


def _signs(model: nn.Module, twin: nn.Module) -> Iterator[_Sign]:
    mine = base_parameters(model)
    for name, reference in twin.named_parameters():
        parameter = mine.get(name.replace("_orig_mod.", ""))
        if parameter is None or parameter.shape != reference.shape or reference.numel() < 2:
            continue
        if reference.is_floating_point() and parameter.is_floating_point():
            sign = _sign(parameter.detach(), reference.detach())
            if sign is not None:
                yield sign


def _sign(parameter: Tensor, reference: Tensor) -> _Sign | None:
    start, highest = map(float, reference.aminmax())
    if start == highest:
        low, high = map(float, parameter.aminmax())
        return _Sign("moved" if low < high else "at its start" if low == start else "set", start)
    if reference.numel() < threshold("freshness.fewest"):
        return None
    values, expected = _sample(parameter), _sample(reference)
    count = values.numel()
    deviation, expected_deviation = float(values.std()), float(expected.std())
    if torch.equal(values, expected):
        return _Sign("alike")  # a table that no seed changes
    if deviation == 0 or expected_deviation == 0:
        return _Sign("otherwise")
    limit = threshold("freshness.deviation")
    kurtosis, expected_kurtosis = _excess_kurtosis(values), _excess_kurtosis(expected)
    error = math.sqrt(24 / count)
    far = abs(kurtosis - expected_kurtosis) > limit * error * math.sqrt(2)
    known = expected_kurtosis <= threshold("freshness.heavy")
    if far and known and all(abs(kurtosis - shape) > limit * error for shape in _SHAPES):
        return _Sign("no draw")
    spread = max(threshold("freshness.least_spread"), (kurtosis + expected_kurtosis) / 2 + 2)
    error = math.sqrt(spread / (2 * count))
    return _Sign("otherwise" if abs(math.log(deviation / expected_deviation)) > limit * error else "alike")


def _sample(tensor: Tensor) -> Tensor:
    stride = tensor.numel() // _MOST
    values = tensor.reshape(-1)
    return (values[:: stride | 1] if stride > 1 else values).double()  # odd: not always the same columns


def _excess_kurtosis(values: Tensor) -> float:
    centred = values - values.mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean().square()) - 3


def _judged(signs: list[_Sign]) -> tuple[Weights, str]:
    constants = [sign for sign in signs if sign.start is not None]
    others = Counter(sign.kind for sign in signs if sign.start is None)
    drawn, share = others.total(), threshold("freshness.share")
    moved = sum(sign.kind == "moved" for sign in constants)
    if moved and moved >= share * len(constants):
        return "trained", _starts(constants)
    if others["no draw"] and others["no draw"] >= share * drawn:
        still = f"{_starts(constants)}, but " if constants else ""
        found = f"{others['no draw']} of {drawn} others" if constants else f"{others['no draw']} of {drawn} tensors"
        return "trained", f"{still}{found} have a distribution that no initialisation draws (excess kurtosis)"
    if not signs:
        return "unknown", "no tensor could be compared with the reference at initialisation"
    if moved:
        return "unknown", f"{_starts(constants)}, and the others look as they are drawn"
    another = sum(sign.kind == "set" for sign in constants) + others["otherwise"] + others["no draw"]
    if another < max(1, share * len(signs)):
        which = (
            f"{len(signs) - another} of {len(signs)} tensors have"
            if another
            else f"every one of {len(signs)} tensors has"
        )
        return "fresh", f"{which} the constant or the spread it is initialised with"
    spread = f"{another} of {len(signs)} tensors have another spread or constant than the class's own"
    if not constants:
        return "unknown", f"{spread}, and none starts constant to tell training from another way of drawing"
    return "fresh", f"{_starts(constants)}, and the others are random draws; {spread}"


def _starts(constants: list[_Sign]) -> str:
    """`31 of 32 tensors that start at 1 and 0 of 64 that start at 0 have moved`."""
    words = {1.0: "at 1", 0.0: "at 0"}
    counted: dict[str, list[bool]] = {}
    for sign in sorted(constants, key=lambda sign: -(sign.start or 0.0)):
        place = words.get(sign.start if sign.start is not None else math.nan, "at another constant")
        counted.setdefault(place, []).append(sign.kind == "moved")
    parts = [f"{sum(moved)} of {len(moved)} that start {place}" for place, moved in counted.items()]
    parts[0] = parts[0].replace(" that", " tensors that", 1)
    several = sum(sum(moved) for moved in counted.values()) != 1 or len(parts) > 1
    return f"{' and '.join(parts)} {'have' if several else 'has'} moved"
