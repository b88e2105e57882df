"""screen: which remedy helps this model, and by how much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fullrank.capture.wrappers import bare
from fullrank.errors import FullrankError, RemedyError, TrialError
from fullrank.remedies import Asked, Prescription, Repair, asked_for, repaired
from fullrank.remedies.candidates import candidates_for
from fullrank.report import Report, Screening
from fullrank.report.screened import AS_IT_IS, LossChange, Screened
from fullrank.spec import Inputs, Subject, inputs, subject_of
from fullrank.trials import RATES, Data, OwnLoss, Recommendation, Settings, Trial, of_batches, of_task, task_for, trial
from fullrank.trials import recommendations as named_recommendations
from fullrank.verbs.batches import Call, as_calls
from fullrank.verbs.examine import examine
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.passes import Progress, anatomy_of
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.restored import Number, compared, identity_distance_in, numbers_of

__all__ = ["screen"]

_MOST = 6  # candidates that are taken from the verdicts


def screen(
    model: nn.Module | str | Subject,
    batch: Any = None,
    *,
    remedies: Sequence[str] | None = None,
    steps: int = 0,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    recommendations: Sequence[str] | None = (),
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = RATES,
    size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Screening:
    """Try remedies on a model, each on the same weights and the same batch, and say what each of them did.

    The model is examined; the candidates that its verdicts name are applied one at a time, the model is examined again,
    and the remedy is undone. With `steps` each variant is also trained, from the same weights, on the same batches in
    the same order, at the best of a few learning rates; then variants are ranked by their loss on held-out sequences,
    paired with that of the model as it is, and by nothing else. Without, they are grouped and not ranked: what restores
    a profile need not train, and a network that does nothing restores every profile (`identity_distance` says so).

    The model is returned as it came, bit for bit.

    Args:
        model: a module, a SPEC or what `spec.load` gave.
        batch: what it is called with, as `examine` takes it; by default one made for it.
        remedies: names of remedies to try, with parameters as in `"temperature?scale=2"`; a `+` joins several that
            are tried together. By default those that the verdicts name, at most six.
        steps: of each training; 0 to train nothing.
        data: batches to train on, the last quarter held out; by default a built-in task that fits the model's inputs.
        loss: of model and batch, where batches have no labels.
        recommendations: plain changes of the training to try as well (`fullrank.trials.RECOMMENDATIONS`); None for all.
        seeds: of the order of batches and of dropout; a training for each.
        rates: learning rates to choose from.
        size: sequences in a batch of the built-in task.
        seed: of the default batch and of the task.
        progress: called with a few words and the share done.

    Returns:
        The screening.

    Raises:
        RemedyError: for an unknown remedy or a parameter out of range.
        TrialError: for steps, data or recommendations that cannot be used.
        FullrankError: for other bad input; see `examine`.
    """
    began = time.perf_counter()
    if steps < 0:
        raise TrialError(f"steps={steps} must not be negative; 0 trains nothing.")
    if not steps and (data is not None or recommendations is None or recommendations):
        raise TrialError("data= and recommendations= are for training: give steps= too, such as steps=150.")
    named = None if remedies is None else {name: _parts(name) for name in remedies}
    plain = named_recommendations(recommendations) if steps else ()
    subject = _subject(model, seed)
    network = subject.model
    given = batch if isinstance(batch, Inputs) else inputs(subject, seed=seed) if batch is None else None
    calls = as_calls(network, batch) if given is None else as_calls(network, list(given.batches), known=given.real)
    hear = progress or (lambda what, share: None)
    bench = _Bench(network, calls, given if given is not None else batch, seed)
    hear("as it is", 0.0)
    before = bench.examined(subject, reference=True)
    failures = [one.name for one in sorted(before.verdicts, key=lambda one: -one.severity.rank)]
    tried = named or {name: _parts(name) for name in candidates_for(failures, most=_MOST)}
    numbers = numbers_of(before, failures)
    school = _School.of(network, calls, steps, data, loss, seeds, rates, size, seed) if steps else None
    base = None if school is None else school.taught(None)
    rows = [_row(AS_IT_IS, numbers, before, before, trained=base, kind=AS_IT_IS)]
    profiles: dict[str, Report] = {AS_IT_IS: before}
    total = max(1, len(tried) + len(plain))
    for done, (name, asked) in enumerate(tried.items()):
        hear(name, (1 + done) / (1 + total))
        row, profile = _tried(bench, school, name, asked, numbers, before, base)
        rows.append(row)
        profiles |= {name: profile} if profile is not None else {}
    for done, one in enumerate(plain, len(tried)):
        hear(one.name, (1 + done) / (1 + total))
        rows.append(_recommended(bench, school, one, base))
    return Screening.of(
        rows,
        steps=steps,
        about=_about(subject, before, failures, named, school, time.perf_counter() - began),
        profiles=profiles,
        notes=_notes(failures, named, school),
    )


@dataclass(frozen=True)
class _Bench:
    """What every variant is examined on."""

    model: nn.Module
    calls: Sequence[Call]
    batch: Any
    seed: int

    def examined(self, subject: Subject | nn.Module, *, reference: bool) -> Report:
        """A report without singular values, of one backward."""
        return examine(
            subject,
            self.batch,
            spectrum=False,
            gradients=True,
            probes=1,
            reference=reference,
            seed=self.seed,
        )

    def repaired(self, asked: Sequence[Asked]) -> Repair:
        """Remedies in force."""
        first = self.calls[0].for_survey()
        return repaired(self.model, lambda: first.run(self.model), asked)


@dataclass(frozen=True)
class _School:
    """What every variant is trained on."""

    model: nn.Module
    data: Data
    steps: int
    seeds: Sequence[int]
    rates: Sequence[float]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calls: Sequence[Call],
        steps: int,
        data: Iterable[Any] | None,
        loss: Callable[[nn.Module, Any], Any] | None,
        seeds: Sequence[int],
        rates: Sequence[float],
        size: int,
        seed: int,
    ) -> _School:
        """A built-in task, or the user's batches."""
        if data is not None:
            causal = all(stack.causal for stack in anatomy_of(model, list(calls), Ranks()).stacks)
            chosen = of_batches(data, loss=loss, causal=causal)
        else:
            first = calls[0]
            chosen = of_task(task_for(model, first.kwargs or first.args, seed=seed), steps=steps, size=size)
        return cls(model, chosen, steps, tuple(seeds), tuple(rates))

    def taught(self, repair: Repair | None, settings: Settings | None = None, rate: float | None = None) -> Trial:
        """The model as it stands, trained."""
        penalised = repair is not None and not isinstance(self.data.objective, OwnLoss)  # models add it to their own
        return trial(
            self.model,
            self.data,
            steps=self.steps,
            seeds=self.seeds,
            settings=settings,
            rates=self.rates,
            rate=rate,
            extra_loss=repair.penalty if penalised and repair is not None else None,
        )


def _tried(
    bench: _Bench,
    school: _School | None,
    name: str,
    asked: Sequence[Asked],
    numbers: Sequence[Number],
    before: Report,
    base: Trial | None,
) -> tuple[Screened, Report | None]:
    """One variant: applied, examined, trained, undone."""
    exactness = " + ".join(dict.fromkeys(one.remedy.exactness for one in asked))
    try:
        repair = bench.repaired(asked)
    except RemedyError as reason:
        return Screened(name, exactness=exactness, note=str(reason), failed=True), None
    try:
        after = bench.examined(bench.model, reference=False)
        trained = None if school is None else school.taught(repair)
        row = _row(name, numbers, before, after, trained=trained, base=base)
        return replace(
            row,
            exactness=exactness,
            parameters="; ".join(map(str, asked)),
            extra_parameters=repair.parameters,
        ), after
    except FullrankError as reason:
        return Screened(name, exactness=exactness, note=str(reason), failed=True), None
    finally:
        repair.undo()


def _recommended(bench: _Bench, school: _School | None, one: Recommendation, base: Trial | None) -> Screened:
    """One plain change of the training."""
    assert school is not None
    assert base is not None
    try:
        settings = one.applied_to(replace(Settings(), learning_rate=base.rate))
        rate = settings.learning_rate if one.fixed_rate else None
        with one.edit(bench.model, anatomy_of(bench.model, list(bench.calls), Ranks())):
            trained = school.taught(None, settings, rate)
    except FullrankError as reason:
        return Screened(one.name, kind="recommendation", note=str(reason), failed=True)
    row = _row(one.name, (), None, None, trained=trained, base=base, kind="recommendation")
    return replace(row, parameters=one.formula, extra_parameters=0)


def _row(
    name: str,
    numbers: Sequence[Number],
    before: Report | None,
    after: Report | None,
    *,
    trained: Trial | None,
    base: Trial | None = None,
    kind: Any = "remedy",
) -> Screened:
    restored = compared(numbers, before, after) if before is not None and after is not None else ()
    row = Screened(
        name,
        kind=kind,
        restored=restored,
        identity_distance=None if after is None else identity_distance_in(after, numbers),
        extra_parameters=0 if kind == AS_IT_IS else None,
    )
    if trained is None:
        return row
    difference = None if base is None else trained.against(base)
    change = None
    if difference is not None:
        change = LossChange(difference.mean, difference.low, difference.high, difference.seeds, difference.sequences)
    return replace(
        row,
        loss=trained.loss,
        change=change,
        trained=trained.trained,
        learning_rate=trained.rate,
        widest_rate=None if trained.rates is None else trained.rates.widest,
        seconds_ratio=None if base is None else trained.seconds / base.seconds,
        note="" if trained.rates is None else trained.rates.note,
    )


def _parts(name: str) -> tuple[Asked, ...]:
    parts: Prescription = [part.strip() for part in name.split("+")]
    return asked_for(parts, {})


def _subject(model: nn.Module | str | Subject, seed: int) -> Subject:
    if isinstance(model, str):
        return loaded(model, seed=seed, head=True)
    if isinstance(model, Subject):
        return model
    if not isinstance(model, nn.Module):
        raise RemedyError(f"screen takes a torch module or a SPEC, and was given {type(model).__name__}.")
    return subject_of(bare(model, []))


def _about(
    subject: Subject,
    before: Report,
    failures: Sequence[str],
    named: Any,
    school: _School | None,
    seconds: float,
) -> dict[str, Any]:
    about: dict[str, Any] = {
        "model": subject.name,
        "verdicts": list(dict.fromkeys(failures)),
        "chosen": "asked for" if named is not None else "named by the verdicts",
        "seconds": round(seconds, 3),
        "versions": before.about.get("versions"),
        "stacks": before.about.get("stacks"),
    }
    if school is not None:
        about |= {"task": school.data.name, "chance": school.data.chance, "seeds": len(school.seeds)}
    return about


def _notes(failures: Sequence[str], named: Any, school: _School | None) -> list[str]:
    notes = [] if school is None else list(school.data.notes)
    if named is None and not failures:
        notes.append(
            "No verdict names a failure, so that no remedy is called for; --try NAME tries one all the same, and "
            "`fullrank remedies` lists them."
        )
    return notes
