"""Recording within a time budget: the first sequence always, what else there is time for, and what was lowered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from fullrank.capture import Anatomy
from fullrank.capture.events import Observer
from fullrank.measure import SpectrumObserver
from fullrank.measure.budget import Budget, Costs, EvenHeads, OutOfTime, Sampling, Shedding, Stop, Timed, sampling
from fullrank.measure.spectra import SEQUENCES
from fullrank.verbs.batches import Call
from fullrank.verbs.passes import Progress, record

__all__ = ["Read", "record_within"]

_LITTLE = 0.05
"""A trial that took a smaller share of the budget is made twice."""

Make = Callable[..., list[Observer]]
"""Observers for one pass; takes `spectrum`, `sequences` and, where fewer heads are looked at, `chosen`."""


@dataclass(frozen=True)
class Read:
    """What was recorded.

    Attributes:
        observers: with everything that was read, as `make` gives them.
        notes: sentences about what was not seen, and about what the budget left out.
        calls: what was read, in whole sequences.
    """

    observers: list[Observer]
    notes: list[str]
    calls: list[Call]


def record_within(
    budget: Budget,
    model: nn.Module,
    calls: Sequence[Call],
    anatomy: Anatomy,
    make: Make,
    tell: Progress,
    *,
    forward: float,
    spectrum: bool,
    named: int | None,
) -> Read:
    """Read as much of the batch as the budget allows.

    The first block of one sequence is tried out, with the singular values of one head; from its time and that of a
    forward follows of what singular values are taken (`measure.budget.sampling`). The first sequence is always read to
    its end: after the budget its forward, its token metrics and its attention rows still run, its singular values no
    more. How many others are read follows from the time of those before; at most as many together as were read already.
    Sequences that are being read when the budget is over are left after the block at hand and thrown away. So the
    budget is overdrawn by the rest of the first sequence without spectra at most, else by one block of the sequences
    that are read together, and by the assembly of the report. Weights are no part of it: where they are asked for they
    are measured whole, however long that takes.

    Args:
        budget: seconds from now on.
        model: in the state it is to be looked at.
        calls: what it is called with; divided into sequences where every tensor of a call has them first.
        anatomy: what the survey found.
        make: makes observers.
        tell: hears of every block.
        forward: seconds that the first call's forward took.
        spectrum: whether singular values are asked for at all.
        named: how many heads the user named; None where all are meant.

    Returns:
        What was read.
    """
    divided = all(_divides(call, anatomy) for call in calls)
    units = [call.sequences if divided else 1 for call in calls]
    first = calls[0].part(0, 1) if divided else calls[0]
    forward = forward / units[0]
    costs = _costs(budget, model, first, anatomy, make, units, forward=forward, spectrum=spectrum, named=named)
    plan = sampling(costs, budget.left, heads_chosen=named is not None)
    whole = plan.spectra == costs.spectra
    few = {} if plan.heads is None else {"chosen": EvenHeads(plan.heads)}
    main: list[Observer] = []
    notes: dict[str, None] = {}
    done: list[Call] = []
    shed = read = place = start = 0
    each, of_spectra = costs.sequence, 0.0
    while place < len(calls) and not (read and budget.over):
        size = min(max(1, read), units[place] - start)
        if read:  # as many more as the time of those before allows
            price = each + (of_spectra if whole and start < SEQUENCES else 0.0)
            size = min(size, int(budget.left / price) if price > 0 else size)
            if size < 1:
                break
        stop = start + size
        taken = _taken(start, stop, divided=divided, whole=whole, first=not read) if plan.spectra else 0
        observers = make(spectrum=taken > 0, sequences=taken or 1, **(few if taken else {}))
        wrapped = [Shedding(one, budget) if isinstance(one, SpectrumObserver) else one for one in observers]
        part = calls[place].part(start, stop) if divided else calls[place]

        def step(what: str, share: float, read: int = read, size: int = size) -> None:
            tell(what, (read + share * size) / sum(units))

        before = budget.left
        try:
            said = record(model, [part], anatomy, [*wrapped, Stop(budget)] if read else wrapped, step)
        except OutOfTime:
            break
        shedding = [one for one in wrapped if isinstance(one, Shedding)]
        spent = sum(one.seconds for one in shedding)
        each, of_spectra = (before - budget.left - spent) / size, spent / taken if taken else of_spectra
        shed += sum(one.shed for one in shedding)
        notes.update(dict.fromkeys(said))
        _merge(main, observers)
        done.append(part)
        read, start = read + size, stop
        if start == units[place]:
            place, start = place + 1, 0
    unit = "sequences" if divided else "batches"
    return Read(main, [*notes, *_said(budget, plan, costs, read, shed, unit)], done)


def _costs(
    budget: Budget,
    model: nn.Module,
    first: Call,
    anatomy: Anatomy,
    make: Make,
    units: Sequence[int],
    *,
    forward: float,
    spectrum: bool,
    named: int | None,
) -> Costs:
    """From the first block of one sequence, with the singular values of one head."""

    def tried() -> list[Timed]:
        made = make(spectrum=spectrum, sequences=1, chosen=EvenHeads(1)) if spectrum else make(spectrum=False)
        timed = [Timed(observer, budget.clock) for observer in made]
        with suppress(OutOfTime):
            record(model, [first], anatomy, [*timed, Stop()], lambda what, share: None)
        return timed

    before = budget.left
    timed = tried()
    if before - budget.left < budget.seconds * _LITTLE:
        timed = tried()  # what is done for the first time takes longer than ever after
    blocks = sum(len(stack.paths) for stack in anatomy.stacks)
    of_spectra = sum(one.seconds for one in timed if isinstance(one.observer, SpectrumObserver))
    rest = sum(one.seconds for one in timed) - of_spectra
    spectra = 0
    if spectrum:
        spectra = len(units) if max(units) == 1 else sum(min(count, SEQUENCES) for count in units)
    each = forward + sum(one.once for one in timed) + blocks * rest
    if named is not None:  # each in one block
        return Costs(each, of_spectra, sum(units), spectra, named)
    heads = max((stack.heads or 0 for stack in anatomy.stacks), default=0)
    return Costs(each, blocks * of_spectra, sum(units), spectra, heads)


def _divides(call: Call, anatomy: Anatomy) -> bool:
    return call.divisible and not any(stack.layout.tokens_first for stack in anatomy.stacks)


def _taken(start: int, stop: int, *, divided: bool, whole: bool, first: bool) -> int:
    """Of how many of the sequences from `start` to `stop` of a call singular values are taken."""
    if not whole:
        return int(first) if divided else SEQUENCES * int(first)
    return max(0, min(stop, SEQUENCES) - start) if divided else SEQUENCES


def _merge(main: list[Observer], more: Sequence[Observer]) -> None:
    """Observers of one kind are one; a kind that is new is added."""
    if not main:
        main.extend(more)
        return
    for observer in more:
        same = next((one for one in main if type(one) is type(observer)), None)
        if same is None:
            main.append(observer)
        else:
            same.merge(observer)


def _said(budget: Budget, plan: Sampling, costs: Costs, read: int, shed: int, unit: str) -> list[str]:
    said = [words.replace("sequences", unit) for words in plan.lowered(costs)]
    if read < costs.sequences:
        how = f"of {costs.sequences} {unit} when it ran out" if budget.over else f"instead of {costs.sequences} {unit}"
        said.append(f"{read} {how}")
    if shed:
        said.append(f"no singular values of {shed} attention calls, when it had run out")
    if not said:
        return []
    return [f"time budget of {budget.seconds:g} s: {'; '.join(said)}."]
