"""A verdict: a named failure, what it is compared with, what an intervention showed, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal

from fullrank.errors import TableError

__all__ = [
    "Against",
    "Checked",
    "Comparison",
    "Diagnosis",
    "Effect",
    "Outcome",
    "Severity",
    "Validity",
    "Verdict",
    "Weights",
]

Against = Literal["initialisation", "null", "dtype", "threshold"]
Outcome = Literal["loss", "distribution", "state"]
Validity = Literal["trained", "fresh", "any"]
Weights = Literal["trained", "fresh", "unknown"]


class Severity(StrEnum):
    """How grave a verdict is; they compare by gravity."""

    NOTE = "note"
    WARN = "warn"
    FAIL = "fail"

    @property
    def rank(self) -> int:
        """0 for a note, 1 for a warning, 2 for a failure."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Comparison:
    """A number of a claim beside what it is compared with.

    Attributes:
        metric: a name of `fullrank.metrics.VOCABULARY`.
        where: `decoder layer 5`, `decoder layer 5, head 3`.
        value: what was measured.
        stderr: its standard error; None where it has none.
        against: what it is compared with: the same architecture at its own initialisation on the same batch, the null,
            the run's dtype, or a threshold of `fullrank.diagnosis.THRESHOLDS` alone.
        expected: what that gives.
    """

    metric: str
    where: str
    value: float
    stderr: float | None = None
    against: Against = "threshold"
    expected: float | None = None

    @property
    def ratio(self) -> float | None:
        """The value over what was expected; None where that is missing or 0."""
        return self.value / self.expected if self.expected else None


@dataclass(frozen=True)
class Effect:
    """What an intervention changed: a mean over documents of the paired difference, with a 95 % interval.

    Attributes:
        intervention: what was done, as words: `layer 5 skipped`.
        outcome: what it is measured by. `loss`: the model's own, in nats, changed minus unchanged. `distribution`: mean
            Kullback–Leibler divergence of the changed output distribution from the unchanged one, in nats. `state`: the
            share of the final state's variance over tokens and documents that is lost, Σ‖x'−x‖² / Σ‖x−x̄‖² (2 for
            unrelated states).
        change: mean over documents.
        low: lower end of the interval.
        high: upper end.
        n: documents.
        baseline: the loss without the intervention; None for the other outcomes.
    """

    intervention: str
    outcome: Outcome
    change: float
    low: float
    high: float
    n: int
    baseline: float | None = None

    @property
    def unit(self) -> str:
        """What the change is counted in."""
        words = {"loss": "of loss", "distribution": "nats of KL", "state": "of the final state's variance"}
        return words[self.outcome]


@dataclass(frozen=True)
class Verdict:
    """A claim with a reference and, where it was tested, an effect.

    Attributes:
        name: of the failure, as `fullrank explain` knows it: `dead-depth`.
        severity: `note` without a test; `warn` and `fail` only where a reference is exceeded and a test confirmed it.
        claim: one sentence with numbers, layers and heads.
        stack: of the model.
        layers: which, from 1 (0 for the state before the first block); empty where it is about all.
        heads: (layer, head); empty where it is about no heads.
        valid_for: for which weights the claim means something.
        comparisons: the numbers and what they are compared with.
        effects: of the interventions that tested it; empty where none did.
        refuted_by: what would show it to be wrong.
        command: to run next.
        candidates: remedies to try first, as `fullrank.repair` takes them.
        screen: the command that tries them.
    """

    name: str
    severity: Severity
    claim: str
    stack: str
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    valid_for: Validity = "any"
    comparisons: tuple[Comparison, ...] = ()
    effects: tuple[Effect, ...] = ()
    refuted_by: str = ""
    command: str = ""
    candidates: tuple[str, ...] = ()
    screen: str = ""


@dataclass(frozen=True)
class Checked:
    """A failure that was looked for and is not there, or could not be looked for.

    Attributes:
        name: of the failure.
        words: what was seen, or why it could not be checked.
    """

    name: str
    words: str


@dataclass(frozen=True)
class Diagnosis:
    """Every failure that was looked for: found, clear, or not checked and why.

    Attributes:
        verdicts: gravest first.
        clear: failures that are not there.
        unchecked: failures that could not be looked for.
        weights: whether the weights look trained or fresh.
        because: how that is known.
        reference: how the reference at initialisation was made, or why there is none.
        outcome: by what interventions were measured; empty where none were asked for.
        kinds: (stack, layer, head) → `pointer`, `mixer`, `average` or `sink`, as a sequence.
    """

    verdicts: tuple[Verdict, ...] = ()
    clear: tuple[Checked, ...] = ()
    unchecked: tuple[Checked, ...] = ()
    weights: Weights = "unknown"
    because: str = ""
    reference: str = ""
    outcome: str = ""
    kinds: tuple[tuple[str, int, int, str], ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The gravest severity; None without verdicts."""
        return max((verdict.severity for verdict in self.verdicts), key=lambda severity: severity.rank, default=None)

    def to_record(self) -> dict[str, Any]:
        """JSON's own types."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Diagnosis:
        """What `to_record` gave.

        Returns:
            An equal diagnosis.

        Raises:
            TableError: for something else.
        """
        try:
            verdicts = tuple(_verdict(one) for one in record["verdicts"])
            clear, unchecked = (tuple(Checked(**one) for one in record[name]) for name in ("clear", "unchecked"))
            rest = {field.name: record[field.name] for field in fields(cls)[3:-1]}
            kinds = tuple((str(s), int(n), int(h), str(kind)) for s, n, h, kind in record["kinds"])
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"this is no diagnosis: {error}.") from None
        return cls(verdicts, clear, unchecked, **rest, kinds=kinds)


def _verdict(record: Mapping[str, Any]) -> Verdict:
    parts = {
        "severity": Severity(record["severity"]),
        "layers": tuple(record["layers"]),
        "heads": tuple((int(layer), int(head)) for layer, head in record["heads"]),
        "comparisons": tuple(Comparison(**one) for one in record["comparisons"]),
        "effects": tuple(Effect(**one) for one in record["effects"]),
        "candidates": tuple(record.get("candidates", ())),
    }
    return Verdict(**(dict(record) | parts))
