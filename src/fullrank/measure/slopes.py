"""How every number changes with the context: per sequence the least-squares slope, over sequences its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.measure.contexts import Reading
from fullrank.measure.samples import Gathered, Place, Samples
from fullrank.table import Row, Slope

__all__ = ["Trend", "slopes", "trend"]

_LEVEL = 0.95
_OF_THE_BATCH = "a number of the whole batch: it has no value per sequence, so that no interval can be given"
_ALONE = "one sequence: no interval"
_UNPAIRED = "no sequence has the number at two contexts"
_SAME = "the sequences of the contexts cannot be told to be the same"
_POSITIONS = frozenset({"sink_position"})


class Trend(NamedTuple):
    """A mean of slopes over sequences: how many, the mean, its standard error, and its 95 % interval; None unknown."""

    n: int
    mean: float | None
    stderr: float | None
    low: float | None
    high: float | None


def trend(x: Float[Tensor, " contexts"], Y: Float[Tensor, "sequences contexts"]) -> Trend:
    """Mean over sequences of the least-squares slope of y on x, with the interval of Student's t.

    β_i = Σ_c (x_c − x̄) y_ic / Σ_c (x_c − x̄)² for every sequence i that has all of its values; the mean of β, its
    standard error s_β/√n, and mean ± t_{.975, n−1} s_β/√n. Taking the slope before the mean pairs the contexts: what
    makes one sequence's values larger at all contexts enters no interval. O(n contexts).

    Args:
        x: such as log₂ of the contexts; not all equal.
        Y: values, NaN where a sequence has none.

    Returns:
        The trend; without an interval for n = 1, without a mean for n = 0.
    """
    Y = Y[~Y.isnan().any(-1)]
    n = Y.shape[0]
    if n == 0:
        return Trend(0, None, None, None, None)
    centred = x - x.mean()
    beta = Y @ centred / centred.square().sum()
    mean = float(beta.mean())
    if n == 1 or not math.isfinite(mean):
        return Trend(n, mean if math.isfinite(mean) else None, None, None, None)
    from scipy.stats import t

    stderr = float(beta.std()) / math.sqrt(n)
    reach = float(t.ppf((1 + _LEVEL) / 2, n - 1)) * stderr
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
        for row in reading.rows():
            scope = row.scope.removesuffix(f"+context={reading.context}")
            key = (Place(row.stack, row.layer, row.site, row.part), row.metric, scope, row.head)
            if row.metric not in _POSITIONS:
                rows.setdefault(key, {})[reading.context] = row
    count = 1 + max((int(n.max()) for r in readings for batches in r.places.values() for n in batches), default=-1)
    values: dict[int, dict[Key, Tensor]] = {}
    for reading in readings:
        values.setdefault(reading.context, {}).update(_values(reading, count))
    found = []
    for key, by_context in rows.items():
        if len(by_context) < 2:
            continue
        have = {c: values[c].get(key) for c in by_context}
        if all(one is None for one in have.values()):
            found.append(_of_rows(key, by_context))
        elif any(one is None for one in have.values()):
            found.append(_slope(key, tuple(by_context), 0, note=_SAME))
        else:
            found.append(_of_sequences(key, {c: one for c, one in have.items() if one is not None}))
    return found


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


def _of_sequences(key: Key, by_context: dict[int, Tensor]) -> Slope:
    known = {c: values for c, values in by_context.items() if not bool(values.isnan().all())}
    contexts = tuple(known)
    if len(contexts) < 2:
        return _slope(key, tuple(by_context), 0, note=_UNPAIRED)
    Y = torch.stack(list(known.values()), -1)  # (sequences, contexts)
    log2 = torch.tensor([math.log2(c) for c in contexts], dtype=torch.float64)
    linear = trend(log2, Y)
    if linear.mean is None:
        return _slope(key, contexts, linear.n, note=_UNPAIRED if linear.n == 0 else "the value is not finite")
    whole = Y[~Y.isnan().any(-1)]
    power = trend(log2 * math.log(2), Y.log()) if bool((whole > 0).all()) else Trend(0, None, None, None, None)
    return _slope(key, contexts, linear.n, linear, power, _ALONE if linear.n == 1 else "")


def _of_rows(key: Key, by_context: dict[int, Row]) -> Slope:
    known = {c: float(row.value) for c, row in by_context.items() if row.value is not None}
    if len(known) < 2:
        return _slope(key, tuple(by_context), 0, note=_UNPAIRED)
    log2 = torch.tensor([math.log2(c) for c in known], dtype=torch.float64)
    y = torch.tensor(list(known.values()), dtype=torch.float64)
    linear = trend(log2, y[None])
    power = trend(log2 * math.log(2), y[None].log()) if bool((y > 0).all()) else Trend(0, None, None, None, None)
    n = min(row.n or 0 for row in by_context.values())
    return _slope(key, tuple(known), n, linear, power, _OF_THE_BATCH)


def _slope(
    key: Key, contexts: tuple[int, ...], n: int, linear: Trend | None = None, power: Trend | None = None, note: str = ""
) -> Slope:
    place, metric, scope, head = key
    nothing = Trend(n, None, None, None, None)
    linear, power = linear or nothing, power or nothing
    return Slope(
        *place,
        metric=metric,
        head=head,
        scope=scope,
        contexts=contexts,
        n=n,
        per_doubling=linear.mean,
        stderr=linear.stderr,
        low=linear.low,
        high=linear.high,
        exponent=power.mean,
        exponent_stderr=power.stderr,
        exponent_low=power.low,
        exponent_high=power.high,
        note=note,
    )
