"""Models with nothing wrong: every family of the compatibility table at its initialisation, and trained ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import families
import torch
from torch import nn

from fullrank.spec import Subject, load
from fullrank.spec.loading import demo
from planted.cases import HALVES, Case, clean, prepared
from planted.trained import ARCHITECTURES

__all__ = ["KINDS", "TRAINED", "Healthy", "Kind", "Patient", "healthy"]

Kind = Literal["drawn", "told", "long", "pretrained", "trained", "other"]

KINDS: Final[dict[Kind, str]] = {
    "drawn": "families at their default initialisation, beside another draw of it",
    "told": "the same, told to be fresh, without a reference",
    "long": "those that read token ids alone, on 8 × 64 random tokens at contexts 16, 32 and 64",
    "pretrained": "the pretrained encoder, on 8 texts, and at contexts 64, 128 and 256",
    "trained": "small models trained on texts and digits, on documents they were not trained on",
    "other": "fresh ones of other widths and depths (4 to 14 layers)",
}
"""What each kind of healthy model is, in words."""

TRAINED: Final = ("pretrained", "trained")

_LONG: Final = (8, 64)  # sequences, tokens
_CONTEXTS: Final = (16, 32, 64)


@dataclass(frozen=True)
class Patient:
    """What examine is called with.

    Attributes:
        model: as examine takes it.
        batch: to run it on; None for the default.
        options: of examine.
    """

    model: nn.Module | Subject
    batch: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Healthy:
    """One healthy model and how it is examined.

    Attributes:
        kind: of `KINDS`.
        name: of the family, or what the case is called.
        case: of the planted study, for trained and for other fresh models.
        contexts: at which lengths.
    """

    kind: Kind
    name: str
    case: Case | None = None
    contexts: tuple[int, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether its weights are."""
        return self.kind in TRAINED

    def patient(self, cache: Path | None = None) -> Patient:
        """Make the model and its batch.

        Args:
            cache: a folder with weights of trained models.

        Returns:
            Both, and how they are examined.
        """
        options = {"contexts": self.contexts} if self.contexts else {}
        if self.case is not None:
            model, batch, _ = prepared(self.case, cache)
            return Patient(model, batch, options)
        if self.kind == "pretrained":
            return Patient(load(demo()), None, options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            one = families.FAMILIES[self.name]()
        one.model.eval()
        if self.kind == "told":
            return Patient(Subject(one.model, self.name, "", fresh=True), one.batch, options)
        if self.kind == "long":
            return Patient(one.model, one.batch | {"input_ids": families.ids(*_LONG)}, options)
        return Patient(one.model, one.batch, options)


def healthy() -> list[Healthy]:
    """All of them, trained ones first: they take longest."""
    found = [Healthy("pretrained", "encoder"), Healthy("pretrained", "encoder over contexts", contexts=(64, 128, 256))]
    for half in HALVES:
        seen = set()
        for case in clean(half):
            of = (case.architecture, case.seed, case.fault, case.layers, case.options)
            if of not in seen:  # one batch each
                seen.add(of)
                contexts = _CONTEXTS if ARCHITECTURES[case.architecture].reads == "text" else ()
                found.append(Healthy("other" if case.fresh else "trained", case.words, case, contexts))
    names = sorted(set(families.FAMILIES) - set(families.REFUSED))
    found += [Healthy(kind, name) for name in names for kind in ("drawn", "told")]
    return [*found, *(Healthy("long", name, contexts=_CONTEXTS) for name in names if _reads_ids_alone(name))]


def _reads_ids_alone(name: str) -> bool:
    return set(families.FAMILIES[name]().batch) <= {"input_ids", "use_cache"}
