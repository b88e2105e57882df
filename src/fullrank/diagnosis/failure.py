"""A failure: what it is called, how it is looked for in rows, how a suspicion is tested, when it is harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.thresholds import threshold
from fullrank.remedies.candidates import CANDIDATES
from fullrank.report.verdict import Comparison, Effect, Severity, Validity, Verdict

if TYPE_CHECKING:
    from fullrank.diagnosis.evidence import Evidence

__all__ = ["Failure", "Join", "Looked", "Suspicion", "Test"]


@dataclass(frozen=True)
class Test:
    """An intervention and what it must show.

    Attributes:
        intervention: what is done.
        expects: `no effect`: the suspicion holds where the upper end of the interval lies below the limit, and is
            refuted where the lower end lies above it. `effect`: the other way round. `told`: what it changes is told,
            and confirms and refutes nothing.
        limits: what counts as an effect, by outcome; none of a test that is only told.
    """

    __test__ = False  # no test case

    intervention: Intervention
    expects: Literal["no effect", "effect", "told"]
    limits: tuple[tuple[str, float], ...] = ()

    def confirms(self, effect: Effect) -> bool | None:
        """Whether an effect bears the suspicion out.

        A loss that falls by more than the limit is an effect too. Whatever the unit of a loss, a share of it is one; of
        a loss that is next to nothing nothing can be told.

        Returns:
            None where the interval holds the limit, or where nothing can be told.
        """
        if self.expects == "told":
            return None
        limit = dict(self.limits)[effect.outcome]
        if effect.baseline is not None:
            if effect.baseline < threshold("effect.least"):
                return None
            limit = min(limit, threshold("effect.share") * effect.baseline)
        if -limit < effect.low and effect.high < limit:
            return self.expects == "no effect"
        return self.expects == "effect" if effect.low > limit or effect.high < -limit else None


@dataclass(frozen=True)
class Suspicion:
    """What the numbers alone say; a verdict once it was tested, a note where it was not.

    Attributes:
        claim: one sentence with numbers, layers and heads.
        stack: of the model.
        severity: what it becomes where every test confirms it; a `note` needs none.
        layers: which.
        heads: (layer, head).
        comparisons: the numbers.
        tests: all must confirm it.
        exceeded: whether a number was held against its reference at initialisation, the null or the dtype, and was
            beyond it: without a test to confirm it, only that keeps a suspicion from being a note.
    """

    claim: str
    stack: str
    severity: Severity
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    tests: tuple[Test, ...] = ()
    exceeded: bool = False


@dataclass(frozen=True)
class Looked:
    """What looking for one failure gave: suspicions, or a sentence that it is clear, or why it could not be checked."""

    suspicions: tuple[Suspicion, ...] = ()
    clear: str = ""
    unchecked: str = ""


Join = Callable[["Evidence", tuple[Suspicion, ...], tuple[Suspicion, ...]], tuple[Suspicion, ...]]
"""Says suspicions of one stack as one. Given are those that came to the same severity once each was tested, with that
severity, and those of the stack that were refuted. Returned are ways to say it, gravest first: one that claims more
than its parts has tests of its own, the last one has none. Said is the first that comes to its severity."""


@dataclass(frozen=True)
class Failure:
    """A named failure of signal propagation.

    Attributes:
        name: short, as on the command line: `dead-depth`.
        title: a few words.
        means: what it is, in a few sentences.
        harmless: when the same numbers mean nothing bad.
        tested: how a suspicion is tested.
        refuted_by: what would show the verdict to be wrong.
        command: to run next, with `{model}`.
        papers: keys and titles of the works behind it.
        valid_for: for which weights.
        look: finds suspicions in the evidence.
        join: says suspicions of one stack as one; None where each is a verdict of its own.
        needs_structure: whether trained weights show it wherever the input has nothing to look for, as random tokens.
    """

    name: str
    title: str
    means: str
    harmless: str
    tested: str
    refuted_by: str
    command: str
    papers: tuple[str, ...]
    valid_for: Validity
    look: Callable[[Evidence], Looked]
    join: Join | None = None
    needs_structure: bool = False

    def verdict(self, suspicion: Suspicion, effects: tuple[Effect | None, ...] | None, model: str) -> Verdict | None:
        """What becomes of a suspicion.

        A suspicion without tests keeps its severity: it rests on its references alone. One with tests is a note until
        they were run; it keeps its severity where all that could be run confirm it, or where none can be run on this
        model, or all are only told, and a reference was exceeded.

        Args:
            suspicion: one of this failure.
            effects: of its tests, in their order, None for one that cannot be run on this model; None where no tests
                were asked for.
            model: what the model is called.

        Returns:
            The verdict; None where a test refuted the suspicion.
        """
        severity = suspicion.severity
        if suspicion.tests and effects is None:
            severity = Severity.NOTE
        elif suspicion.tests and effects is not None:
            run = [(t, e) for t, e in zip(suspicion.tests, effects, strict=True) if e is not None]
            said = [test.confirms(effect) for test, effect in run if test.expects != "told"]
            if False in said:
                return None
            severity = severity if (all(said) if said else suspicion.exceeded) else Severity.NOTE
        return Verdict(
            name=self.name,
            severity=severity,
            claim=suspicion.claim,
            stack=suspicion.stack,
            layers=suspicion.layers,
            heads=suspicion.heads,
            valid_for=self.valid_for,
            comparisons=suspicion.comparisons,
            effects=tuple(effect for effect in effects or () if effect is not None),
            refuted_by=self.refuted_by,
            # what was tested needs no test
            command=f"fullrank explain {self.name}" if effects is not None else self.command.format(model=model),
            candidates=CANDIDATES.get(self.name, ()),
            screen=f"fullrank screen {model}",
        )
