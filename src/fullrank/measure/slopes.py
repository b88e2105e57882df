"""How every number changes with the context: per sequence the least-squares slope, over sequences its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fullrank.measure.contexts import Reading
from fullrank.measure.samples import Gathered, Place, Samples
from fullrank.table import Row, Slope, without_context

__all__ = ["Trend", "slopes", "trend"]

_LEVEL = 0.95
_OF_THE_BATCH = "a number of the whole batch: it has no value per sequence, so that no interval can be given"
_ALONE = "one sequence: no interval"
_INFINITE = "the value is not finite"
_UNPAIRED = "no sequence has the number at two contexts"
_SAME = "the sequences of the contexts cannot be told to be the same"
_POSITIONS = frozenset({"max_abs_position", "nearest_head", "sink_position"})


class Trend(NamedTuple):
    """Means of slopes over sequences: how many, the mean, its standard error, its 95 % interval; NaN where unknown."""

    n: Int[Tensor, "*lead"]
    mean: Float[Tensor, "*lead"]
    stderr: Float[Tensor, "*lead"]
    low: Float[Tensor, "*lead"]
    high: Float[Tensor, "*lead"]


def trend(x: Float[Tensor, " contexts"], Y: Float[Tensor, "*lead sequences contexts"]) -> Trend:
    """Mean over sequences of the least-squares slope of y on x, with the interval of Student's t.

    β_i = Σ_c (x_c − x̄) y_ic / Σ_c (x_c − x̄)² for every sequence i that has all of its values; the mean of β, its
    standard error s_β/√n, and mean ± t_{.975, n−1} s_β/√n. Taking the slope before the mean pairs the contexts: what
    makes one sequence's values larger at all contexts enters no interval. O(n contexts).

    Args:
        x: such as log₂ of the contexts; not all equal.
        Y: values, NaN where a sequence has none.

    Returns:
        The trend; without an interval for n = 1, without a mean for n = 0 and for values that are not finite.
    """
    from scipy.special import stdtrit

    complete = ~Y.isnan().any(-1)
    n = complete.sum(-1)
    centred = x - x.mean()
    beta = torch.where(complete, Y @ centred / centred.square().sum(), 0)
    mean = beta.sum(-1) / n
    apart = torch.where(complete, beta - mean[..., None], 0).square().sum(-1)
    several = torch.where(n > 1, n, torch.nan)
    stderr = (apart / (several - 1) / several).sqrt()
    freedom = (n - 1).clamp(min=1).double().cpu().numpy()
    reach = torch.as_tensor(stdtrit(freedom, (1 + _LEVEL) / 2), dtype=stderr.dtype) * stderr
    mean = torch.where(mean.isfinite(), mean, torch.nan)
    return Trend(n, mean, stderr, mean - reach, mean + reach)


def slopes(readings: Sequence[Reading]) -> list[Slope]:
    """The slope of every number that was read at two contexts or more.

    Numbers per sequence are paired: each sequence's slope is taken over the contexts, then the mean over sequences that
    have all of them. Contexts at which no sequence has the number are left out. Numbers of a whole batch (shares of its
    energy, similarity across sequences) have a slope and no interval; positions have none.

    Args:
        readings: of one set of sequences, contexts rising.

    Returns:
        Slopes, in the order of the rows.
    """
    rows: dict[tuple[Place, str, str, int | None], dict[int, Row]] = {}
    for reading in readings:
        for row in reading.rows:
            scope, _ = without_context(row.scope)
            key = (Place(row.stack, row.layer, row.site, row.part), row.metric, scope, row.head)
            if row.metric not in _POSITIONS:
                rows.setdefault(key, {})[reading.context] = row
    count = 1 + max((int(n.max()) for r in readings for batches in r.places.values() for n in batches), default=-1)
    values: dict[int, dict[Key, Tensor]] = {}
    for reading in readings:
        values.setdefault(reading.context, {}).update(_values(reading, count))
    found: dict[Key, Slope] = {}
    groups: dict[tuple[int, ...], dict[Key, Tensor]] = {}
    for key, by_context in rows.items():
        if len(by_context) < 2:
            continue
        have = {c: values[c].get(key) for c in by_context}
        paired = {c: one for c, one in have.items() if one is not None}
        if not paired:
            found[key] = _of_rows(key, by_context)
        elif len(paired) < len(have):
            found[key] = _slope(key, tuple(by_context), 0, note=_SAME)
        else:
            known = {c: one for c, one in paired.items() if not bool(one.isnan().all())}
            found[key] = _slope(key, tuple(by_context), 0, note=_UNPAIRED)
            if len(known) > 1:
                groups.setdefault(tuple(known), {})[key] = torch.stack(list(known.values()), -1)
    for contexts, together in groups.items():
        found |= _of_sequences(contexts, together)
    return list(found.values())


Key = tuple[Place, str, str, int | None]


def _values(reading: Reading, sequences: int) -> dict[Key, Tensor]:
    """The values of one context, (sequences,) over all sequences of all batches, NaN where there is none."""
    found: dict[Key, Tensor] = {}
    for observer in reading.observers:
        samples = getattr(observer, "samples", None)
        if not isinstance(samples, Samples):
            continue
        for gathered in samples.series():
            stack = gathered.place.stack
            if stack not in reading.stacks:
                continue
            whole = _placed(gathered, reading.places.get(stack, []), sequences)
            if whole is None:
                continue
            if whole.ndim == 1:
                found[gathered.place, gathered.metric, gathered.scope, None] = whole
                continue
            heads = range(whole.shape[1]) if gathered.heads is None else gathered.heads
            for column, head in zip(whole.unbind(1), heads, strict=True):
                found[gathered.place, gathered.metric, gathered.scope, head] = column
    return found


def _placed(gathered: Gathered, kept: Sequence[Tensor], sequences: int) -> Tensor | None:
    """Every value at its sequence's place; None where the batches cannot be told apart."""
    if len(gathered.values) != len(kept):
        return None
    whole = torch.full((sequences, *gathered.values[0].shape[1:]), torch.nan, dtype=torch.float64)
    for values, places in zip(gathered.values, kept, strict=True):
        if len(values) > len(places):
            return None
        whole[places[: len(values)]] = values.to("cpu", torch.float64)  # spectra are of the first few of a batch
    return whole


def _of_sequences(contexts: tuple[int, ...], together: dict[Key, Tensor]) -> dict[Key, Slope]:
    """Slopes of many numbers of the same sequences, (sequences, contexts) each."""
    Y = torch.stack(list(together.values()))
    log2 = torch.tensor([math.log2(c) for c in contexts], dtype=torch.float64)
    complete = ~Y.isnan().any(-1, keepdim=True)
    positive = ((Y > 0) | ~complete).all(-1).all(-1)
    linear = trend(log2, Y)
    power = trend(log2 * math.log(2), torch.where(positive[:, None, None], Y, torch.nan).log())
    found = {}
    columns = zip(together, _numbers(linear), _numbers(power), strict=True)
    for key, (n, *ours), (_, *theirs) in columns:
        count = int(n or 0)
        note = _UNPAIRED if count == 0 else _INFINITE if ours[0] is None else _ALONE if count == 1 else ""
        found[key] = _slope(key, contexts, count, ours, theirs, note)
    return found


def _numbers(trend: Trend) -> list[list[float | None]]:
    """One line per number, None for NaN."""
    lines = torch.stack([part.double() for part in trend], -1).tolist()
    return [[None if math.isnan(value) else value for value in line] for line in lines]


def _of_rows(key: Key, by_context: dict[int, Row]) -> Slope:
    known = {c: float(row.value) for c, row in by_context.items() if row.value is not None}
    if len(known) < 2:
        return _slope(key, tuple(by_context), 0, note=_UNPAIRED)
    y = torch.tensor([list(known.values())], dtype=torch.float64)
    one = _of_sequences(tuple(known), {key: y})[key]
    return replace(one, n=min(row.n or 0 for row in by_context.values()), note=_OF_THE_BATCH)


_NOTHING = (None, None, None, None)


def _slope(
    key: Key,
    contexts: tuple[int, ...],
    n: int,
    linear: Sequence[float | None] = _NOTHING,
    power: Sequence[float | None] = _NOTHING,
    note: str = "",
) -> Slope:
    place, metric, scope, head = key
    per_doubling, stderr, low, high = linear
    exponent, of_exponent, lowest, highest = power
    return Slope(
        *place,
        metric=metric,
        head=head,
        scope=scope,
        contexts=contexts,
        n=n,
        per_doubling=per_doubling,
        stderr=stderr,
        low=low,
        high=high,
        exponent=exponent,
        exponent_stderr=of_exponent,
        exponent_low=lowest,
        exponent_high=highest,
        note=note,
    )
