"""The experts of a mixture, also those that no token was sent to."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from torch import nn

from fullrank.capture.reference import module_at
from fullrank.capture.weights import Runs, Weight, indices, runs, shape_of_parameter

__all__ = ["experts", "stacked"]


def experts(model: nn.Module, block: str, sets: list[list[Weight]], every: Set[str]) -> list[Weight]:
    """Number the experts among the MLPs that work side by side.

    Experts are slices of one parameter along an axis of its own, or blocks of its rows, or children of one class of a
    list; an expert of the first forward stands for all that are stored like it.

    Args:
        model: the model.
        block: name of the block.
        sets: for each MLP its weights.
        every: names of all down projections of the block.

    Returns:
        The weights; those of experts with their number, one set for each that the model has.
    """
    found: list[Weight] = []
    shared = {
        weights[-1].parameter for weights in sets if sum(w[-1].parameter == weights[-1].parameter for w in sets) > 1
    }
    for weights in sets:
        if any(weight.stacked for weight in weights):
            found.extend(stacked(model, weights))
        elif weights[-1].parameter in shared:
            found.extend(_sliced(model, weights))
        else:
            found.extend(_listed(model, block, weights, {w[-1].parameter for w in sets}, every))
    return found


def stacked(model: nn.Module, weights: list[Weight]) -> list[Weight]:
    """The same weights once for every slice that all of their parameters have: some experts hold no weights."""
    count = min(shape_of_parameter(model, weight)[0] for weight in weights if weight.stacked)
    return [replace(weight, expert=expert) for expert in range(count) for weight in weights]


def _sliced(model: nn.Module, weights: list[Weight]) -> list[Weight]:
    """Each expert has as many rows (or columns) of the parameter as this one."""
    found = []
    for weight in weights:
        along, axes = (weight.rows, weight.out_axes) if weight.rows is not None else (weight.columns, weight.in_axes)
        shape = shape_of_parameter(model, weight)
        if along is None or not shape:
            found.append(weight)
            continue
        chosen = indices(along)
        size, total = len(chosen), 1
        for axis in axes:
            total *= shape[axis]
        for expert in range(total // size):
            moved: Runs = runs(number % size + expert * size for number in chosen)
            of = {"rows": moved} if weight.rows is not None else {"columns": moved}
            found.append(replace(weight, expert=expert, **of))  # type: ignore[arg-type]
    return found


def _listed(model: nn.Module, block: str, weights: list[Weight], group: Set[str], every: Set[str]) -> list[Weight]:
    """Children of one list: experts where several work side by side or some are not called at all."""
    down = weights[-1].parameter
    if not down.startswith(f"{block}."):
        return weights
    parts = down.split(".")
    for depth in range(block.count(".") + 2, len(parts)):
        path = ".".join(parts[:depth])
        module = module_at(model, path)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        own = down[len(path) + 1 :].split(".")[0]
        children = _alike(module, own)
        beside, called = (
            {name[len(path) + 1 :].split(".")[0] for name in names if name.startswith(f"{path}.")}
            for names in (group, every)
        )
        if len(children) < 2 or (len(beside) < 2 and len(called) == len(children)):
            continue
        old = f"{path}.{own}."
        return [
            replace(
                weight,
                parameter=weight.parameter.replace(old, f"{path}.{name}.", 1),
                beside=tuple(other.replace(old, f"{path}.{name}.", 1) for other in weight.beside),
                expert=number,
            )
            for number, name in enumerate(children)
            for weight in weights
        ]
    return weights


def _alike(container: nn.Module, own: str) -> list[str]:
    """The children of a list whose parameters have the names and shapes of one of them."""
    shapes = {
        name: {inner: parameter.shape for inner, parameter in child.named_parameters()}
        for name, child in container.named_children()
    }
    return [name for name, found in shapes.items() if found == shapes.get(own)]
