"""Applying remedies to a model, and taking them back."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy
from fullrank.capture.wrappers import bare
from fullrank.edit import Edit, together
from fullrank.edit.handle import make
from fullrank.errors import BatchError, FullrankError, RemedyError
from fullrank.remedies.applying.answer import answer_of
from fullrank.remedies.applying.applied import Applied, notes_on
from fullrank.remedies.applying.asked import Asked
from fullrank.remedies.applying.proof import proof_of
from fullrank.remedies.applying.record import Recorded, repairs_in
from fullrank.remedies.applying.trained import Checksums, changed, checksums, differ, parameters_of, tensors_of
from fullrank.remedies.applying.turns import IN_FORCE, Turn, added_before
from fullrank.remedies.patient import Patient
from fullrank.remedies.penalty import Penalty, penalty_of

__all__ = ["Applied", "Repair", "repaired"]


class Repair:
    """Remedies in force on a model.

    A context manager that undoes them at the end of the block, and a plain handle. Before any step of training `undo()`
    restores the model bit for bit; afterwards it takes the structure out and leaves trained weights as they are.

    Attributes:
        model: the model.
        applied: the remedies, in the order applied.
        notes: sentences for the reader.
    """

    def __init__(
        self, model: nn.Module, applied: Sequence[Applied], changes: Edit, original: Checksums, now: Checksums
    ) -> None:
        self.model, self.applied = model, tuple(applied)
        self.notes = notes_on(model, applied)
        self._changes = changes
        self._added = {name for one in applied for name in one.added}
        self._original = original  # before any of them
        self._before = now
        self._said = ""
        self._turn = Turn(self._names, weakref.ref(self), frozenset(self._added))
        IN_FORCE.setdefault(bare(model), []).append(self._turn)

    @property
    def in_force(self) -> bool:
        """Whether it was not undone yet."""
        return self._changes.in_force

    @property
    def parameters(self) -> int:
        """How many numbers to be trained were added."""
        return sum(one.parameters for one in self.applied)

    @property
    def trained(self) -> bool:
        """Whether the model's parameters, other than those that were added, have other values since."""
        return bool(changed(self.model, self._before, parameters_of(self.model) - self._added).moved)

    def penalty(self) -> Tensor:
        """What remedies of the loss have still to add to it: `loss + repair.penalty()` is always right.

        A model that returns a loss of its own in training has it in there already, and this is 0 then. Where you
        differentiate another loss than the one that the model returns, call the model without labels.

        Returns:
            A scalar, of the latest forward; 0 where no remedy is one of the loss.
        """
        return penalty_of(self.model)

    def undo(self) -> str:
        """Take the remedies out again.

        Returns:
            A sentence: whether the model is as it was, bit for bit, or keeps what was trained.

        Raises:
            RemedyError: where others were applied after it and are still in force, or something else stands in the way.
        """
        if not self.in_force:
            return self._said
        turns = IN_FORCE.get(bare(self.model), [])
        later = turns[turns.index(self._turn) + 1 :] if self._turn in turns else []
        if later:
            names = ", ".join(one.names for one in later)
            lost = all(one.repair() is None for one in later)
            way = "its handle was not kept, so that neither can be undone" if lost else "undo that first"
            raise RemedyError(f"{names} was applied after {self._names}; {way}.")
        own = changed(self.model, self._before, parameters_of(self.model) - self._added)
        folded = {name for name in self._added if own and ".parametrizations." in name}  # kept in the weight
        learnt = changed(self.model, self._before, self._added - folded).moved
        try:
            if own:
                self._changes.leave()
            else:
                self._changes.undo()
        except FullrankError as reason:
            raise RemedyError(f"{self._names} cannot be undone: {reason}") from None
        turns.remove(self._turn)
        if own.moved:
            self._said = f"{self._names} removed; the model was trained since and keeps its trained weights."
        elif own:
            self._said = (
                f"{self._names} removed; the model was converted to another type since, and its weights stay as they "
                "are now."
            )
        else:
            self._said = f"{self._names} undone; {self._as_it_was()}"
        if learnt:
            self._said += " What was trained in added parameters is gone."
        return self._said

    def _as_it_was(self) -> str:
        """What is found of the model after undoing, not what is hoped."""
        parameters = parameters_of(self.model)
        found = changed(self.model, self._original)
        other = [name for name in (*found.moved, *found.rounded) if name in parameters]
        if other:
            names = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            return f"{names} are not what they were: something else has changed them since."
        if found:
            number = len(found.moved) + len(found.rounded)
            return (
                f"the model's parameters are as they were, bit for bit; {number} buffers, such as running statistics, "
                "moved since and stay."
            )
        if any(one.dtype != self._original[name][0] for name, one in tensors_of(self.model) if name in self._original):
            return "the model has the values that it had, bit for bit, in another type."
        return "the model is as it was, bit for bit."

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.undo()
        except FullrankError as reason:
            if error is None:
                raise
            error.add_note(str(reason))  # what went wrong in the block is not hidden by what comes of it

    def __str__(self) -> str:
        lines = [str(one) for one in self.applied] + list(self.notes)
        return "\n".join(lines if self.in_force else [*lines, self._said])

    __repr__ = __str__

    @property
    def _names(self) -> str:
        return ", ".join(one.asked.remedy.name for one in self.applied)


def repaired(model: nn.Module, forward: Callable[[], Any], asked: Sequence[Asked]) -> Repair:
    """Apply remedies one after the other; where one fails, those before it are taken back.

    Args:
        model: the model.
        forward: one forward pass, on which the model is looked at and each remedy is proved to act.
        asked: what to apply.

    Returns:
        The handle.

    Raises:
        RemedyError: where one is in force already, does not fit the model or does not act; nothing is changed then.
        BatchError: where the model fails in its forward without them.
    """
    there = {one["name"] for module in bare(model).modules() for one in repairs_in(module)}
    again = [one.remedy.name for one in asked if one.remedy.name in there]
    if again:
        copied = not IN_FORCE.get(bare(model)) and bool(repairs_in(model))
        way = "it is a copy of a repaired model, and keeps its repairs" if copied else "undo it first"
        raise RemedyError(f"{again[0]} is in force on this {type(bare(model)).__name__} already; {way}.")
    edits: list[Edit] = []
    applied: list[Applied] = []
    random = torch.get_rng_state()
    # what is made in inference mode could never be trained
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with outside:
        original = sums = checksums(model)
        answer: Tensor | None = None
        anatomy: Anatomy | None = None
        try:
            for one in asked:
                others = added_before(model, [name for each in applied for name in each.added])
                try:
                    answer = _answered(model, forward) if answer is None else answer
                    done, sums, answer, anatomy = _applied(model, forward, one, edits, sums, answer, anatomy, others)
                except BatchError:
                    raise
                except FullrankError as reason:
                    raise RemedyError(_refusal(model, one, applied, str(reason))) from reason.__cause__
                applied.append(done)
            entries = [_entry(one) for one in asked]
            edits.append(make("record the repairs", [], [lambda: Recorded(model, entries)]))
        except BaseException:
            for edit in reversed(edits):
                edit.undo()
            raise
        finally:
            torch.set_rng_state(random)
        return Repair(model, applied, together(edits), original, sums)


def _refusal(model: nn.Module, asked: Asked, applied: Sequence[Applied], reason: str) -> str:
    before = [str(one["name"]) for one in repairs_in(model)] + [one.asked.remedy.name for one in applied]
    after = f" after {', '.join(before)}" if before else ""
    named = reason.startswith(asked.remedy.name) and not before
    return reason if named else f"{asked.remedy.name} cannot be applied{after}: {reason}"


def _answered(model: nn.Module, forward: Callable[[], Any]) -> Tensor:
    try:
        return answer_of(model, forward)
    except FullrankError:
        raise
    except Exception as error:
        raise BatchError(f"{type(bare(model)).__name__} does not run on this batch: {_said(error)}") from error


def _applied(
    model: nn.Module,
    forward: Callable[[], Any],
    asked: Asked,
    edits: list[Edit],
    sums: Checksums,
    before: Tensor,
    anatomy: Anatomy | None,
    others: Sequence[nn.Parameter],
) -> tuple[Applied, Checksums, Tensor, Anatomy | None]:
    """One remedy put in place; with the checksums, the answer and the anatomy that the next one begins with."""
    known = {id(p) for p in model.parameters()}
    penalties = _penalties(model)
    patient = Patient(model, forward, anatomy)
    edit = asked.remedy.apply(patient, **asked.parameters)
    edits.append(edit)
    added = {name: p for name, p in bare(model).named_parameters() if id(p) not in known}
    now = checksums(model)
    acts = differ(sums, now) or bool(_penalties(model) - penalties)
    try:
        proof, after = proof_of(model, forward, before, added, acts=acts, others=others)
    except FullrankError:
        raise
    except Exception as error:
        raise RemedyError(f"with it {type(bare(model)).__name__} does not run on this batch: {_said(error)}") from error
    broken = int((~after.isfinite()).sum()) - int((~before.isfinite()).sum()) if proof.turned else 0
    if asked.remedy.acts_on == "weights" and broken > 0:
        raise RemedyError(f"with it {broken:,} entries of the output are NaN or infinite that were not: it was undone.")
    if added and not proof.acts:
        raise RemedyError(f"{asked.remedy.name} was put in place and the output does not depend on it: it was undone.")
    done = Applied(asked, edit, {name: p.numel() for name, p in added.items()}, proof)
    return done, now, after, patient.known if edit.only_values else None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no more is said').splitlines()[0]}"


def _penalties(model: nn.Module) -> set[Penalty]:
    return {one for one in model.modules() if isinstance(one, Penalty)}


def _entry(asked: Asked) -> dict[str, Any]:
    entry = {
        "name": asked.remedy.name,
        "parameters": dict(asked.parameters),
        "structural": asked.remedy.is_structural(asked.parameters),
    }
    return json.loads(json.dumps(entry))  # type: ignore[no-any-return]  # as it will be read back
