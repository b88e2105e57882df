"""From a report to a diagnosis: the reference is drawn, the evidence gathered, suspicions are tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fullrank.capture import Anatomy
from fullrank.diagnosis import Evidence, diagnose
from fullrank.diagnosis.catalogue import FAILURES
from fullrank.diagnosis.effects import Trials
from fullrank.diagnosis.freshness import freshness
from fullrank.diagnosis.initialisation import reinitialised
from fullrank.diagnosis.kinds import kinds
from fullrank.errors import BatchError
from fullrank.report import Report
from fullrank.report.verdict import Weights
from fullrank.spec import Subject
from fullrank.table import Table
from fullrank.verbs.asked import Held
from fullrank.verbs.batches import Call
from fullrank.verbs.passes import Progress
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.referenced import reference_rows

__all__ = ["Reference", "diagnosed", "reference_of", "require_testable"]

_OTHER_SEED = 7919  # or fresh weights would be compared with themselves


@dataclass(frozen=True)
class Reference:
    """What a model is compared with.

    Attributes:
        report: rows of the same architecture at its own initialisation; None where there are none.
        weights: whether the model's own look trained or fresh.
        because: how that is known.
        how: how the reference was made, or why there is none.
        notes: sentences for the reader of the report.
    """

    report: Report | None
    weights: Weights
    because: str
    how: str
    notes: tuple[str, ...] = ()


def reference_of(
    subject: Subject,
    calls: Sequence[Call],
    anatomy: Anatomy,
    *,
    unwanted: str,
    seed: int,
    tell: Progress,
    ranks: Ranks,
    **measured: Any,
) -> Reference:
    """Draw the same architecture at its own initialisation and measure it on the same calls.

    Args:
        subject: the model.
        calls: what it was called with.
        anatomy: what the survey found in it.
        unwanted: why none is drawn; empty where one is.
        seed: of the run; the reference is drawn with another one.
        tell: hears of every block.
        ranks: the processes that do the same on their parts.
        measured: what is measured beside stream and attention, as `reference_rows` takes it.

    Returns:
        The reference, and what comparing the weights with it says of them.
    """
    unwanted = unwanted or _unfit(subject, calls, ranks)
    if unwanted:
        return _none(subject, unwanted)
    tell("drawing the initialisation", 0.0)
    try:
        made = reinitialised(subject.model, seed=seed + _OTHER_SEED)
        weights, because = freshness(subject.model, made.model, told=subject.fresh)
        if made.model is None:
            return Reference(None, weights, because, made.how)
        rows, notes = reference_rows(
            made.model, calls, anatomy, seed=seed, tell=tell, ranks=ranks, like=subject.model, **measured
        )
    except Exception as error:  # noqa: BLE001 - a reference that fails must not take the report with it
        return _none(subject, f"drawing it failed ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})")
    report = Report(rows=Table(rows), about={"model": f"{subject.name} at initialisation"}) if rows else None
    how = made.how if rows else next(iter(notes), "no reference: nothing was measured of it.")
    return Reference(report, weights, because, how, tuple(notes) if rows else ())


def _unfit(subject: Subject, calls: Sequence[Call], ranks: Ranks) -> str:
    """Why a reference would say nothing of this run; empty where it would."""
    if ranks.several:
        return "the model is distributed"
    if subject.fresh:
        return "the weights are fresh, and are their own initialisation"
    return "the batch continues a cache that this model has made" if any(call.past for call in calls) else ""


def _none(subject: Subject, why: str) -> Reference:
    weights, because = freshness(subject.model, None, told=subject.fresh)
    return Reference(None, weights, because, f"no reference: {why}.")


def require_testable(calls: Sequence[Call], ranks: Ranks) -> None:
    """Refuse what no intervention can be tested on, before anything is measured.

    Args:
        calls: what the model is called with.
        ranks: the processes that examine it.

    Raises:
        BatchError: for a distributed model, packed rows, and a batch that continues a cache.
    """
    if ranks.several:
        raise BatchError("verify= goes with one process: this model is distributed.")
    if any(call.documents is not None or call.past for call in calls):
        raise BatchError("verify= goes with whole sequences: this batch is packed or continues a cache.")


def diagnosed(
    report: Report,
    subject: Subject,
    calls: Sequence[Call],
    anatomy: Anatomy,
    reference: Reference,
    *,
    held: Held,
    verify: bool,
    batch_statistics: bool = False,
) -> Report:
    """The report with its reference and its diagnosis.

    Args:
        report: what was measured.
        subject: of which.
        calls: on what.
        anatomy: what the survey found.
        reference: from `reference_of`.
        held: what the model is held against beside its references.
        verify: whether suspicions are tested by intervention.
        batch_statistics: as the model was run.

    Returns:
        The same report with both.
    """
    evidence = Evidence.of(
        replace(report, reference=reference.report),
        weights=reference.weights,
        bos=_begins(subject, calls),
        dtypes=held.dtypes,
        epsilon=held.epsilon,
    )
    tester = None
    if verify:
        tester = Trials(subject.model, anatomy, calls, batch_statistics=batch_statistics)
    diagnosis = diagnose(
        evidence,
        FAILURES,
        tester=tester,
        because=reference.because,
        reference=reference.how,
        kinds=kinds(evidence),
    )
    if tester is not None:
        diagnosis = replace(diagnosis, outcome=tester.words)
    return replace(report, reference=reference.report, diagnosis=diagnosis)


def _begins(subject: Subject, calls: Sequence[Call]) -> bool | None:
    """Whether every sequence begins with the token that the tokenizer begins texts with.

    Returns:
        None where it begins texts with none (GPT-2 has such a token and never puts it in front), or nobody knows.
    """
    token = getattr(subject.tokenizer, "bos_token_id", None)
    if token is None or not _puts_in_front(subject.tokenizer, token):
        return None
    if any(call.token_ids is None or isinstance(call.real, dict) for call in calls):
        return None
    for call in calls:
        assert call.token_ids is not None
        first = torch.zeros(len(call.token_ids), 1, dtype=torch.long, device=call.token_ids.device)
        if isinstance(call.real, Tensor):
            first = call.real.to(call.token_ids.device).int().argmax(1, keepdim=True)
        if not bool((call.token_ids.gather(1, first) == token).all()):
            return False
    return True


def _puts_in_front(tokenizer: Any, token: int) -> bool:
    try:
        return list(tokenizer("a")["input_ids"])[:1] == [token]
    except Exception:  # noqa: BLE001 - whatever stands in for a tokenizer may not read texts
        return False
