"""The stream in front of a stack's first block, and its size there and behind the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.capture.reference import reference_path
from fullrank.edit import Edit, replace_stream
from fullrank.errors import EditError
from fullrank.remedies.patient import Patient

__all__ = ["first_states", "mean_squares"]

Place = tuple[str, int]
"""Stack and layer: 0 in front of the first block."""


def first_states(patient: Patient, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the first block of each stack is given, on the batch.

    Args:
        patient: the model.
        held: first states that take the place of those that are seen.

    Returns:
        (sequences, tokens, width) by stack; without stacks of which it is not known where their tokens lie.
    """
    names = [stack.name for stack in patient.anatomy.stacks]
    found: dict[str, Tensor] = {}

    def note(name: str, X: Tensor) -> Tensor:
        found[name] = X.detach().clone()
        return X if held is None else held[name]

    if held is not None:
        _watch(patient, {(name, 0): partial(note, name) for name in held})
        return found
    for name in names:
        try:
            _watch(patient, {(name, 0): partial(note, name)})
        except EditError:
            found.pop(name, None)
    return found


def mean_squares(patient: Patient, *, ends: bool) -> dict[Place, float]:
    """The mean square of the stream's entries on the batch.

    Args:
        patient: the model.
        ends: whether behind the last block of each stack too.

    Returns:
        By stack and layer, where it can be seen.
    """
    found: dict[Place, float] = {}

    def note(place: Place, X: Tensor) -> Tensor:
        found[place] = float(X.detach().double().square().mean())
        return X

    places = [
        (stack.name, layer) for stack in patient.anatomy.stacks for layer in ((0, len(stack.paths)) if ends else (0,))
    ]
    try:
        _watch(patient, {place: partial(note, place) for place in places})
    except EditError:
        for place in places:
            try:
                _watch(patient, {place: partial(note, place)})
            except EditError:
                found.pop(place, None)
    return found


def _watch(patient: Patient, functions: Mapping[Place, Callable[[Tensor], Tensor]]) -> None:
    """One forward in which functions of states take their places."""
    with ExitStack() as stack, undisturbed(patient.model), reference_path(patient.model, []):
        for (name, layer), function in functions.items():
            edit: Edit = replace_stream(patient.model, patient.anatomy, function, stack=name, layer=layer)
            stack.enter_context(edit)
        patient.forward()
