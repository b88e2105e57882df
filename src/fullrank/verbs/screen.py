"""screen: which remedy helps this model, and by how much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from fullrank.capture.wrappers import bare
from fullrank.errors import RemedyError, TrialError
from fullrank.remedies import Prescription
from fullrank.remedies.candidates import candidates_for
from fullrank.report import Report, Screening
from fullrank.report.screened import AS_IT_IS
from fullrank.spec import Inputs, Subject, inputs, subject_of
from fullrank.trials import RATES
from fullrank.verbs.batches import as_calls
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.passes import Progress
from fullrank.verbs.restored import numbers_of
from fullrank.verbs.screen_arguments import joined, rates_of, recommendations_of, seeds_of, variants_of, whole
from fullrank.verbs.screen_grounds import Bench, School
from fullrank.verbs.screen_variants import Start, recommended, tried

__all__ = ["screen"]

_MOST = 6  # candidates that are taken from the verdicts


def screen(
    model: nn.Module | str | Subject,
    batch: Any = None,
    *,
    remedies: Prescription | None = None,
    steps: int = 0,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    recommendations: str | Sequence[str] | None = (),
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = RATES,
    size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Screening:
    """Try remedies on a model, each on the same weights and the same batch, and say what each of them did.

    The model is examined; the candidates that its verdicts name are applied one at a time, the model is examined again,
    and the remedy is undone. What fails with one of them is noted there, and the others go on. With `steps` each
    variant is also trained, from the same weights, on the same batches in the same order, at the best of a few learning
    rates; then variants are ranked by their loss on held-out sequences, paired with that of the model as it is, and by
    nothing else. Without, they are grouped and not ranked: what restores a profile need not train, and a network that
    does nothing restores every profile (`identity_distance` says so).

    The model is returned as it came, bit for bit.

    Args:
        model: a module, a SPEC or what `spec.load` gave.
        batch: what it is called with, as `examine` takes it; by default one made for it.
        remedies: names of remedies to try, with parameters as in `"temperature?scale=2"`, or a mapping from names to
            parameters, each tried alone; a `+` joins several that are tried together. By default those that the
            verdicts name, at most six.
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
    whole("steps", steps, least=0, meaning="; 0 trains nothing")
    whole("size", size, least=1)
    whole("seed", seed, least=0)
    chosen_seeds, chosen_rates = seeds_of(seeds), rates_of(rates)
    if not steps and (data is not None or recommendations is None or recommendations):
        raise TrialError("data= and recommendations= are for training: give steps= too, such as steps=150.")
    named = variants_of(remedies)
    plain = recommendations_of(recommendations) if steps else ()
    subject = _subject(model, seed)
    network = subject.model
    given = batch if isinstance(batch, Inputs) else inputs(subject, seed=seed) if batch is None else None
    calls = as_calls(network, batch) if given is None else as_calls(network, list(given.batches), known=given.real)
    hear = progress or (lambda what, share: None)
    bench = Bench(network, calls, given if given is not None else batch, seed)
    hear("as it is", 0.0)
    before = bench.examined(subject, reference=True)
    failures = [one.name for one in sorted(before.verdicts, key=lambda one: -one.severity.rank)]
    variants = named or {name: joined(name) for name in candidates_for(failures, most=_MOST)}
    school = School.of(network, calls, steps, data, loss, chosen_seeds, chosen_rates, size, seed) if steps else None
    start = Start(numbers_of(before), before, None if school is None else school.taught(None))
    rows = [start.row]
    profiles: dict[str, Report] = {AS_IT_IS: before}
    total = max(1, len(variants) + len(plain))
    for done, (name, asked) in enumerate(variants.items()):
        hear(name, (1 + done) / (1 + total))
        row, profile = tried(bench, school, name, asked, start)
        rows.append(row)
        profiles |= {name: profile} if profile is not None else {}
    for done, one in enumerate(plain, len(variants)):
        hear(one.name, (1 + done) / (1 + total))
        assert school is not None
        rows.append(recommended(bench, school, one, start))
    return Screening.of(
        rows,
        steps=steps,
        about=_about(subject, before, failures, named, school, time.perf_counter() - began),
        profiles=profiles,
        notes=_notes(start, failures, named, school),
    )


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
    school: School | None,
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


def _notes(start: Start, failures: Sequence[str], named: Any, school: School | None) -> list[str]:
    notes = [] if school is None else list(school.data.notes)
    for one in start.row.restored:
        if one.failure and one.before is None:
            notes.append(f"{one.metric}, the failure's own number of {one.failure}, could not be read in {one.place}.")
        elif one.failure and one.target is None:
            notes.append(
                f"{one.metric}, the failure's own number of {one.failure}, has no reference in {one.place}: nothing "
                "says where it should be."
            )
    if named is None and not failures:
        notes.append(
            "No verdict names a failure, so that no remedy is called for; --try NAME tries one all the same, and "
            "`fullrank remedies` lists them."
        )
    return notes
