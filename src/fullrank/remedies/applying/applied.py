"""One remedy in force: what it changed, and what to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fullrank.capture.wrappers import bare, library_class
from fullrank.edit import Edit
from fullrank.remedies.applying.asked import Asked
from fullrank.remedies.applying.proof import Proof

__all__ = ["Applied", "notes_on", "of_adapters"]


class Applied:
    """One remedy in force, with what it changed.

    Attributes:
        asked: the remedy and its parameters.
        edit: what was changed and where.
        added: names and sizes of parameters that were added.
        proof: what it did to the output.
    """

    def __init__(self, asked: Asked, edit: Edit, added: Mapping[str, int], proof: Proof) -> None:
        self.asked, self.edit, self.added, self.proof = asked, edit, dict(added), proof

    @property
    def parameters(self) -> int:
        """How many numbers to be trained were added."""
        return sum(self.added.values())

    def __str__(self) -> str:
        where = self.edit.where
        places = f"{len(where)} places ({where[0]} … {where[-1]})" if len(where) > 2 else " and ".join(where)
        numbers = f"{self.parameters:,} parameters added" if self.parameters else "no parameters added"
        default = str(self.asked) == self.asked.remedy.name  # what is declared holds of no other parameters
        exactness = f" [{self.asked.remedy.exactness}]" if default else ""
        return f"{self.asked}{exactness} at {places}; {numbers}; {self.proof}."


def notes_on(model: nn.Module, applied: Sequence[Applied]) -> tuple[str, ...]:
    """What the reader of a repair has to know beside what was changed.

    Args:
        model: the repaired model.
        applied: the remedies.

    Returns:
        Sentences.
    """
    return tuple(_notes(model, applied))


def of_adapters(model: nn.Module) -> bool:
    """Whether a model is one that `peft` has wrapped, and saves its adapters alone."""
    return isinstance(bare(model), library_class("peft", "PeftModel"))


def _notes(model: nn.Module, applied: Sequence[Applied]) -> Iterator[str]:
    for one in applied:
        yield from (f"{one.asked.remedy.name}: {note}" for note in one.edit.notes)
    for one in applied:
        silent = one.proof.unheard
        if silent:
            names = ", ".join(silent[:4]) + (f" and {len(silent) - 4} more" if len(silent) > 4 else "")
            number = f"{len(silent)} added parameter{'s' if len(silent) > 1 else ''}"
            yield f"{one.asked.remedy.name}: the output does not depend on {number}: {names}."
    nans = applied[-1].proof.nans if applied else 0
    if nans:
        yield f"{nans:,} entries of the output are NaN: whether a remedy acts on them is not known."
    if of_adapters(model) and any(one.asked.remedy.is_structural(one.asked.parameters) for one in applied):
        yield (
            f"{type(bare(model)).__name__}.save_pretrained saves the adapters alone, without what was added here: save "
            "the state_dict, or repair the model before it gets adapters, and save that too."
        )
