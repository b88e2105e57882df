"""What every edit hands back: something to undo, to leave at the end of a `with` block, and to print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

__all__ = ["Change", "Edit", "Ordered", "make", "together"]


class Change(Protocol):
    """One thing that was changed on a model."""

    def check(self) -> None:
        """Raise an `EditError` where it cannot be taken back now; change nothing."""

    def undo(self) -> None:
        """Take it back."""

    def leave(self) -> None:
        """Take the structure out, and leave the values of weights as they are now."""


class Ordered:
    """A change that can only be taken back after those of the same thing that were made later.

    Attributes:
        beside: the changes that are taken back together with it, in reverse order.
    """

    beside: Sequence[object] = ()


class Edit:
    """A change to a model that is in force until it is undone.

    Made by the functions of this package. As a context manager it is undone at the end of the block, whatever happened
    inside; as a plain handle by `undo()`. Edits nest, and may be undone in any order; where that cannot be, undoing
    says so and changes nothing.

    Attributes:
        what: what is changed, in a few words.
        where: names of the modules or parameters that are changed.
        parameters: how many numbers to be trained were added.
        notes: sentences for the reader, of whoever made it.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, what: str, where: Sequence[str], changes: Sequence[Change], parameters: int = 0) -> None:
        self.what = what
        self.where = tuple(where)
        self.parameters = parameters
        self._changes = tuple(changes)
        for change in self._changes:
            if isinstance(change, Ordered):
                change.beside = self._changes

    @property
    def in_force(self) -> bool:
        """Whether it was not undone yet."""
        return bool(self._changes)

    @property
    def only_values(self) -> bool:
        """Whether nothing but values of weights is changed, so that the model's code and structure are as before."""
        return all(getattr(change, "only_values", False) for change in self._changes)

    def undo(self) -> None:
        """Put back what was there before, bit for bit; a second time nothing happens."""
        for change in self._changes:
            change.check()
        for change in reversed(self._changes):
            change.undo()
        self._changes = ()

    def leave(self) -> None:
        """Take away what was added to the model, and keep trained values; a second time nothing happens.

        As `undo()`, but for weights: replaced values stay as they are now, and a reparametrised weight becomes the
        parameter W = f(V) with its present value. Whatever changes a forward is gone: with it the model computes
        something else than before.

        Raises:
            EditError: as `undo()`; and where something stands between a function and its parameter that was there
                before it, so that no parameter gives the present weight: that has to go first.
        """
        for change in self._changes:
            change.check()
        while self._changes:  # in the order they were made: of several functions of a weight the innermost first
            self._changes[0].leave()
            self._changes = self._changes[1:]

    @contextmanager
    def kept(self) -> Iterator[Self]:
        """A block after which the edit stays; where something fails inside it is undone."""
        try:
            yield self
        except BaseException:
            self.undo()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        where = ", ".join(self.where[:4]) + (f" and {len(self.where) - 4} more" if len(self.where) > 4 else "")
        added = f"; {self.parameters} parameters added" if self.parameters else ""
        return f"<{self.what} at {where}{added}{'' if self.in_force else '; undone'}>"


def make(what: str, where: Sequence[str], changes: Iterable[Callable[[], Change]], parameters: int = 0) -> Edit:
    """Make changes one after the other; where one fails, those before it are taken back.

    Returns:
        The handle.
    """
    made: list[Change] = []
    try:
        made.extend(change() for change in changes)
    except BaseException:
        for change_made in reversed(made):
            change_made.undo()
        raise
    return Edit(what, where, made, parameters)


def together(edits: Iterable[Edit]) -> Edit:
    """Several edits as one handle, made one after the other; where making one fails, those before it are undone.

    Args:
        edits: edits in force, or what makes them as they are asked for; their own handles are spent.

    Returns:
        The common handle, which undoes them in reverse order; of none it is not in force.
    """
    made: list[Edit] = []
    try:
        made.extend(edits)
    except BaseException:
        for edit in reversed(made):
            edit.undo()
        raise
    changes = [change for edit in made for change in edit._changes]
    for edit in made:
        edit._changes = ()
    what = "; ".join(dict.fromkeys(edit.what for edit in made))
    where = [place for edit in made for place in edit.where]
    common = Edit(what, where, changes, sum(edit.parameters for edit in made))
    common.notes = tuple(note for edit in made for note in edit.notes)
    return common
