"""From evidence to verdicts: every failure is looked for, every suspicion tested where that was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Join, Looked, Suspicion
from fullrank.diagnosis.intervention import Intervention
from fullrank.report.verdict import Checked, Diagnosis, Effect, Outcome, Severity, Verdict

__all__ = ["Tester", "diagnose"]


class Tester(Protocol):
    """Runs interventions on the model that the evidence is of."""

    @property
    def outcome(self) -> Outcome:
        """By what effects are measured."""
        ...

    @property
    def refused(self) -> str:
        """Why nothing at all can be tested on what the model was run on; empty where something can."""
        ...

    def effect(self, intervention: Intervention) -> Effect | str:
        """What an intervention changes, or why it cannot be run on this model."""
        ...


def diagnose(
    evidence: Evidence,
    failures: Sequence[Failure],
    *,
    tester: Tester | None = None,
    because: str = "",
    reference: str = "",
    kinds: Sequence[tuple[str, int, int, str]] = (),
) -> Diagnosis:
    """Look for every failure.

    Args:
        evidence: rows and references.
        failures: to look for, in the order in which verdicts of one severity are listed.
        tester: runs the tests of suspicions; None where none are asked for.
        because: how it is known whether weights are trained.
        reference: how the reference at initialisation was made, or why there is none.
        kinds: of heads.

    Returns:
        Verdicts, gravest first; what is clear; what could not be checked.
    """
    model = _spec(evidence.about)
    verdicts: list[Verdict] = []
    clear: list[Checked] = []
    unchecked: list[Checked] = []
    for failure in failures:
        if failure.valid_for != "any" and evidence.weights not in ("unknown", failure.valid_for):
            unchecked.append(Checked(failure.name, f"means something for {failure.valid_for} weights only."))
            continue
        looked = _on_this_input(failure, evidence, failure.look(evidence))
        tried = partial(_tried, failure, tester, model, unchecked)
        said = [(suspicion, tried(suspicion)[0]) for suspicion in looked.suspicions]
        found = [verdict for _, verdict in said if verdict is not None]
        whole = found if failure.join is None else _joined(failure.join, evidence, said, tried)
        verdicts += [replace(one, claim=one.claim + _noise(failure, evidence)) for one in whole]
        if looked.unchecked:
            unchecked.append(Checked(failure.name, looked.unchecked))
        if looked.suspicions and not found:
            clear.append(Checked(failure.name, "suspected from the numbers, and refuted by intervention."))
        elif not found and not looked.unchecked:
            clear.append(Checked(failure.name, looked.clear))
    order = {failure.name: index for index, failure in enumerate(failures)}
    verdicts.sort(key=lambda verdict: (-verdict.severity.rank, order[verdict.name]))
    return Diagnosis(
        verdicts=tuple(verdicts),
        clear=tuple(clear),
        unchecked=tuple(dict.fromkeys(unchecked)),
        weights=evidence.weights,
        because=because,
        reference=reference,
        outcome=tester.outcome if tester is not None and not tester.refused else "",
        kinds=tuple(kinds),
    )


def _on_this_input(failure: Failure, evidence: Evidence, looked: Looked) -> Looked:
    """What was looked for, with suspicions of trained weights that were fed noise made notes, for some failures."""
    # An intervention is no guard there: on such an input, what a head would have looked for is not missed either.
    if not _noise(failure, evidence):
        return looked
    return replace(
        looked, suspicions=tuple(replace(one, severity=Severity.NOTE, tests=()) for one in looked.suspicions)
    )


def _noise(failure: Failure, evidence: Evidence) -> str:
    """A sentence on what trained weights were fed, where that explains the numbers; else empty."""
    if not failure.needs_structure or not evidence.unstructured or evidence.weights == "fresh":
        return ""
    return f" On {evidence.unstructured} there is nothing to look for: examine it on what it is for."


def _joined(
    join: Join,
    evidence: Evidence,
    said: Sequence[tuple[Suspicion, Verdict | None]],
    tried: Callable[[Suspicion], tuple[Verdict | None, tuple[Effect, ...]]],
) -> list[Verdict]:
    """One verdict of each stack and severity; its effects are those of its parts, then those of being one."""
    groups: dict[tuple[str, Severity], list[tuple[Suspicion, Verdict]]] = {}
    for suspicion, verdict in said:
        if verdict is not None:
            groups.setdefault((suspicion.stack, verdict.severity), []).append((suspicion, verdict))
    found = []
    for (stack, severity), group in groups.items():
        parts = tuple(replace(suspicion, severity=severity) for suspicion, _ in group)
        refuted = tuple(one for one, verdict in said if verdict is None and one.stack == stack)
        effects = [effect for _, verdict in group for effect in verdict.effects]
        for whole in join(evidence, parts, refuted):
            verdict, more = tried(whole)
            effects += more
            if verdict is not None and verdict.severity is whole.severity:
                found.append(replace(verdict, effects=tuple(effects)))
                break
    return found


def _spec(about: Mapping[str, Any]) -> str:
    """The model as a shell reads it, its own random weights asked for; SPEC for one that was passed as a module."""
    name = str(about.get("model") or "")
    if not name or name == about.get("architecture"):
        return "SPEC"
    return f"{shlex.quote(name)} --init" if about.get("fresh") else shlex.quote(name)


def _tried(
    failure: Failure, tester: Tester | None, model: str, unchecked: list[Checked], suspicion: Suspicion
) -> tuple[Verdict | None, tuple[Effect, ...]]:
    """What becomes of a suspicion, and what its tests changed; why one could not be run is added to `unchecked`."""
    effects, reasons = _tested(suspicion, tester)
    unchecked += [Checked(failure.name, reason) for reason in reasons]
    return failure.verdict(suspicion, effects, model), tuple(effect for effect in effects or () if effect is not None)


def _tested(suspicion: Suspicion, tester: Tester | None) -> tuple[tuple[Effect | None, ...] | None, list[str]]:
    if tester is None:
        return None, []
    if tester.refused:  # of this batch, which says nothing of the model: suspicions stay as untested as without it
        return None, [f"nothing could be tested: {tester.refused}"] if suspicion.tests else []
    effects: list[Effect | None] = []
    reasons: list[str] = []
    for test in suspicion.tests:
        effect = tester.effect(test.intervention)
        if isinstance(effect, str):
            reasons.append(f"{test.intervention.words}: {effect}")
        effects.append(None if isinstance(effect, str) else effect)
    return tuple(effects), reasons
