"""Changing weights by their roles: scaled, or drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fullrank.capture.weights import Runs, Weight, indices
from fullrank.edit import Edit, replace_weight, together
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["change_weights", "scale_weights"]

New = Callable[[Tensor], Tensor]


def scale_weights(patient: Patient, factor: Callable[[str, int, Weight], float], *roles: str) -> Edit:
    """Multiply the weights of some roles, each by its factor; weights that several blocks share once.

    Args:
        patient: the model.
        factor: of (stack, layer, weight).
        roles: of `q k v o up gate down`.

    Returns:
        One handle.

    Raises:
        RemedyError: where one of them is not known or cannot be read.
    """
    return change_weights(patient, lambda stack, layer, weight: lambda W: W * factor(stack, layer, weight), *roles)


def change_weights(patient: Patient, new: Callable[[str, int, Weight], New], *roles: str) -> Edit:
    """Give the weights of some roles new values, each as a matrix (out, in).

    Args:
        patient: the model.
        new: for (stack, layer, weight) a function of the present matrix.
        roles: of `q k v o up gate down`.

    Returns:
        One handle.

    Raises:
        RemedyError: where one of them is not known or cannot be read.
    """
    edits: list[Edit] = []
    try:
        edits.extend(_changes(patient, new, roles))
    except BaseException:
        for edit in reversed(edits):
            edit.undo()
        raise
    if not edits:
        raise RemedyError(f"no weights {', '.join(roles)} were found in this {type(patient.model).__name__}.")
    return together(edits)


def _changes(patient: Patient, new: Callable[[str, int, Weight], New], roles: tuple[str, ...]) -> Iterator[Edit]:
    found = patient.weights(*roles)
    for _, layer, weight in found:
        if weight.reason:
            raise RemedyError(f"the weight {weight.part!r} of layer {layer} is not known: {weight.reason}.")
    done: set[Weight] = set()
    for stack, layer, weight in found:
        if weight in done:
            continue
        done.add(weight)
        value = new(stack, layer, weight)
        yield replace_weight(patient.model, weight.parameter, lambda P, w=weight, f=value: _within(P, w, f))  # type: ignore[misc]


def _within(parameter: Tensor, weight: Weight, value: New) -> Tensor:
    """The whole parameter, with other numbers in the rows and columns that play the role."""
    if weight.expert is not None and weight.stacked:
        parameter[weight.expert] = _within(parameter[weight.expert].clone(), replace(weight, stacked=False), value)
        return parameter
    order = (*weight.out_axes, *weight.in_axes)
    view = parameter.permute(order)
    rows = view.shape[: len(weight.out_axes)].numel()
    whole = view.reshape(rows, -1).clone()
    rows_of, columns_of = _index(weight.rows, whole, 0), _index(weight.columns, whole, 1)
    grid = rows_of[:, None], columns_of[None, :]
    whole[grid] = value(whole[grid].clone()).to(whole.dtype)
    return whole.reshape(view.shape).permute(_inverse(order))


def _index(chosen: Runs | None, whole: Tensor, axis: int) -> Tensor:
    numbers = range(whole.shape[axis]) if chosen is None else indices(chosen)
    return torch.tensor(list(numbers), device=whole.device)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
