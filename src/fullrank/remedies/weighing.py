"""Changing weights by their roles: scaled, or drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fullrank.capture.reference import module_at
from fullrank.capture.weights import Runs, Weight, form_of, indices
from fullrank.capture.wrappers import bare
from fullrank.edit import Edit, replace_weight, together
from fullrank.errors import RemedyError
from fullrank.remedies.covering import check_branches, identities, notes_on_rest
from fullrank.remedies.patient import Patient

__all__ = [
    "change_weights",
    "changed",
    "check_parameter",
    "check_weight",
    "head_rows",
    "scale_weights",
]

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
        RemedyError: where one of them is not known or cannot be read; with the last weights of all branches among the
            roles, where those of a branch are not known.
    """
    if {"o", "down"} <= set(roles):
        check_branches(patient)
    return change_weights(patient, lambda stack, layer, weight: lambda W: W * factor(stack, layer, weight), *roles)


def change_weights(
    patient: Patient, new: Callable[[str, int, Weight], New], *roles: str, part: str | None = None
) -> Edit:
    """Give the weights of some roles new values, each as a matrix (out, in).

    Args:
        patient: the model.
        new: for (stack, layer, weight) a function of the present matrix.
        roles: of `q k v o up gate down`.
        part: only those that serve this attention call, such as `self`.

    Returns:
        One handle; its notes name matrices of the blocks that add to these weights and, where all roles of a block are
        asked for, those without a role.

    Raises:
        RemedyError: where one of them is not known or cannot be read.
    """
    found = patient.weights(*roles, part=part)
    notes = notes_on_rest(patient, roles, [weight for _, _, weight in found])
    edit = together(_changes(patient, new, found))
    if not edit.in_force:
        raise RemedyError(f"no weights {', '.join(roles)} were found in this {type(patient.model).__name__}.")
    edit.notes += notes
    return edit


def check_weight(patient: Patient, layer: int, weight: Weight) -> None:
    """Refuse a weight whose numbers cannot be read and written where they stand.

    Args:
        patient: the model.
        layer: whose weight it is, for the sentence.
        weight: one of its roles.

    Raises:
        RemedyError: where it is not known, or `check_parameter` refuses it.
    """
    if weight.reason:
        raise RemedyError(f"the weight {weight.part!r} of layer {layer} is not known: {weight.reason}.")
    check_parameter(patient, weight.parameter)


def check_parameter(patient: Patient, name: str) -> None:
    """Refuse a parameter whose numbers cannot be read and written where they stand.

    Args:
        patient: the model.
        name: of the parameter.

    Raises:
        RemedyError: where it is made by a parametrisation, is offloaded, or is stored in a form of its own.
    """
    path, _, last = name.rpartition(".")
    module = module_at(patient.model, path) or module_at(bare(patient.model), path)
    held = None if module is None else module._parameters.get(last, module._buffers.get(last))
    if module is None or (held is None and not hasattr(type(module), last) and last not in vars(module)):
        raise RemedyError(f"this {type(bare(patient.model)).__name__} has no parameter {name!r} any more.")
    if any(isinstance(one, Tensor) and last.startswith(f"{other}_") for other, one in vars(module).items()):
        raise RemedyError(
            f"{name} is one of those that a weight is made of whenever it is used, and that does not follow its size; "
            "apply what changes weights before what makes them."
        )
    if held is None:
        raise RemedyError(
            f"{name} is made by a parametrisation{_kinds(module, last)} and has no values of its own; apply what "
            "changes weights before what parametrises them."
        )
    if held.is_meta:
        raise RemedyError(f"{name} is offloaded, so that its values are not there to be changed; load the model whole.")
    if form_of(held):
        raise RemedyError(f"{name} is stored as {form_of(held)}: it has no plain values to be changed.")


def changed(patient: Patient, weight: Weight, value: New) -> Edit:
    """Give one weight another value, as a matrix (out, in)."""
    return replace_weight(patient.model, weight.parameter, partial(_all_within, parts=[(weight, value)]))


def head_rows(weight: Weight) -> list[list[int]]:
    """For each attention head its rows (for `o` its columns), counted within the matrix of the role.

    With grouped queries a key head stands once for every query head that it serves.

    Returns:
        Numbers of each head; none where the role has no heads.
    """
    whole = weight.columns if weight.role == "o" else weight.rows
    if whole is None:
        return [indices(head) for head in weight.heads]
    place = {number: at for at, number in enumerate(indices(whole))}
    return [[place[number] for number in indices(head)] for head in weight.heads]


def _kinds(module: nn.Module, name: str) -> str:
    if not parametrize.is_parametrized(module, name):
        return ""
    return f" ({' and '.join(type(one).__name__ for one in module.parametrizations[name])})"  # type: ignore[index]


def _changes(
    patient: Patient, new: Callable[[str, int, Weight], New], found: Sequence[tuple[str, int, Weight]]
) -> Iterator[Edit]:
    for _, layer, weight in found:
        check_weight(patient, layer, weight)
    held = identities(patient)
    done: set[tuple[object, ...]] = set()
    of_parameter: dict[str, list[tuple[Weight, New]]] = {}
    for stack, layer, weight in found:
        part = (held.get(weight.parameter, weight.parameter), weight.rows, weight.columns, weight.expert)
        if part not in done:  # a weight that several blocks share, under whatever name, is changed once
            done.add(part)
            of_parameter.setdefault(weight.parameter, []).append((weight, new(stack, layer, weight)))
    for parameter, parts in of_parameter.items():  # once for each, however many roles or experts it holds
        yield replace_weight(patient.model, parameter, partial(_all_within, parts=parts))


def _all_within(parameter: Tensor, *, parts: Sequence[tuple[Weight, New]]) -> Tensor:
    for weight, value in parts:
        parameter = _within(parameter, weight, value)
    return parameter


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
