"""One change for each branch, or for each place where branches are added to the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.capture.anatomy import Stack
from fullrank.edit import Branch, Branches, Edit, rewrite_residual, scale_branch, together
from fullrank.edit.adding import Function
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["Gain", "Weighted", "added_otherwise", "depth_of", "fitted", "followed", "scaled_branches", "shapes_of"]


class Gain(nn.Module):
    """F ← αF, with α one number, or one for each feature.

    Args:
        features: how many numbers.
        start: of each.
    """

    def __init__(self, features: int, start: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((features,), start))

    def forward(self, F: Tensor) -> Tensor:
        """What is added, scaled."""
        return F * self.alpha.to(F.dtype)


class Weighted:
    """X, F → λX + βF.

    Args:
        skip: λ.
        branch: β.
    """

    def __init__(self, skip: float, branch: float) -> None:
        self.skip, self.branch = skip, branch

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        """The new state."""
        return self.skip * X + self.branch * F


def followed(patient: Patient) -> Branches:
    """The branches of a model of which every block could be followed.

    Args:
        patient: the model.

    Returns:
        At least one.

    Raises:
        RemedyError: where there is none, or those of some block are not known.
    """
    branches = patient.branches
    if branches.notes:
        raise RemedyError(f"it is not known what is to be changed: {branches.notes[0]}")
    branches.chosen(None, None, None)
    return branches


def stack_of(patient: Patient, name: str) -> Stack:
    """The stack of a name."""
    return next(stack for stack in patient.anatomy.stacks if stack.name == name)


def depth_of(patient: Patient, branch: Branch) -> int:
    """L: block calls of the stack of a branch."""
    return len(stack_of(patient, branch.stack).paths)


def fitted(patient: Patient, stack: str, layer: int, module: nn.Module) -> nn.Module:
    """A new module on the device of a block and in the type of its weights."""
    block = module_at(patient.model, stack_of(patient, stack).paths[layer - 1])
    weights = next((p for p in block.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
    return module if weights is None else module.to(device=weights.device, dtype=weights.dtype)


def scaled_branches(
    patient: Patient, name: str, by: Callable[[Branch], float | Callable[[Tensor], Tensor] | None]
) -> Iterator[Edit]:
    """Multiply what each branch adds, or put it through a module.

    Args:
        patient: the model.
        name: of the remedy.
        by: what for; a module is registered where the branch is returned. None leaves a branch as it is. It is asked
            once for a module that several layers share.

    Yields:
        Edits.

    Raises:
        RemedyError: where branches could not be followed.
    """
    for group in _by_module(patient):
        first = group[0]
        made = by(first)
        if isinstance(made, nn.Module):
            made = fitted(patient, first.stack, first.layer, made)
        if made is not None:
            yield scale_branch(patient.model, Branches(tuple(group)), by=made, name=registered(name))


def shapes_of(patient: Patient) -> dict[tuple[str, int, str], torch.Size]:
    """What each branch adds, by its shape: stages of one stack may be of several widths. Cost: one forward.

    Args:
        patient: the model; it is left as it was.

    Returns:
        Of (stack, layer, branch) the shape of what its module returns in the forward at hand.

    Raises:
        RemedyError: where branches could not be followed.
    """
    seen: dict[int, torch.Size] = {}

    def look(at: int, F: Tensor) -> Tensor:
        seen[at] = F.shape
        return F

    groups = _by_module(patient)
    looks = (
        scale_branch(patient.model, Branches(tuple(group)), by=partial(look, at)) for at, group in enumerate(groups)
    )
    edit = together(looks)
    with edit, undisturbed(patient.model):
        patient.forward()
    return {(one.stack, one.layer, one.name): seen[at] for at, group in enumerate(groups) for one in group}


def _by_module(patient: Patient) -> list[list[Branch]]:
    """The branches that one module returns in one place."""
    groups: dict[tuple[str, int | str], list[Branch]] = {}
    for branch in followed(patient):
        groups.setdefault((branch.path, branch.item), []).append(branch)
    return list(groups.values())


def added_otherwise(patient: Patient, name: str, function: Callable[[Branch], Function | None]) -> Iterator[Edit]:
    """Put f(X, F) in the place of X + F.

    Args:
        patient: the model.
        name: of the remedy.
        function: f for a branch; of branches that are summed before they are added for the first of them for which
            there is one. A module is registered in the block. None leaves the sum as it is. For a block that several
            layers share there is one.

    Yields:
        Edits.

    Raises:
        RemedyError: where branches could not be followed, or only some of the layers share a block.
    """
    branches = followed(patient)
    done: set[tuple[str, str, int]] = set()
    for branch in branches:
        stack = stack_of(patient, branch.stack)
        path = stack.paths[branch.layer - 1]
        if (branch.stack, path, branch.addition) in done:
            continue
        shared = stack.paths.count(path) > 1
        if shared and len(set(stack.paths)) > 1:
            raise RemedyError(f"some of the layers of {stack.name} share a block and some do not.")
        made = function(branch)
        if made is None:
            continue
        done.add((branch.stack, path, branch.addition))
        if isinstance(made, nn.Module):
            made = fitted(patient, branch.stack, branch.layer, made)
        beside = [one for one in branches if (one.stack, one.addition) == (branch.stack, branch.addition)]
        yield rewrite_residual(
            patient.model,
            patient.anatomy,
            Branches(tuple(beside)),
            made,
            stack=branch.stack,
            layer=None if shared else branch.layer,
            name=f"{registered(name)}_{branch.name.replace('.', '_')}",
        )


def registered(name: str) -> str:
    """Under which modules of a remedy are registered."""
    return "fullrank_" + name.replace("-", "_")
