"""The norms of a model as remedies change them: by their role, each module once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fullrank.edit import Edit, Norm, replace_module
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["as_given", "norms_in", "placement", "without_norms"]


def placement(patient: Patient, stack: str) -> str:
    """Where the norms of a stack stand: `pre`, `post`, `peri`, `res-post`, `none`, or `mixed`.

    Args:
        patient: the model.
        stack: its name.

    Returns:
        The word.

    Raises:
        RemedyError: where it is not known.
    """
    if patient.norms.notes:
        raise RemedyError(patient.norms.notes[0].rstrip(".") + ", and this remedy needs to know them.")
    found: set[frozenset[str]] = set()
    for branch in patient.branches:
        if branch.stack == stack:
            there = patient.norms.of(stack, branch.layer)
            found.add(frozenset(norm.role for norm in there if norm.branch == branch.name))
    names = {
        frozenset(("read",)): "pre",
        frozenset(("sum",)): "post",
        frozenset(("read", "branch")): "peri",
        frozenset(("branch",)): "res-post",
        frozenset[str](): "none",
    }
    return names.get(next(iter(found)), "mixed") if len(found) == 1 else "mixed"


def norms_in(patient: Patient, *roles: str, why: str) -> dict[str, tuple[Norm, ...]]:
    """The norms of some roles by the modules that compute them.

    Args:
        patient: the model.
        roles: of `read sum branch final`.
        why: they are needed, for the sentence.

    Returns:
        Path of the module → what it normalises; at least one.

    Raises:
        RemedyError: where there is none, or one is no module.
    """
    name = type(patient.model).__name__
    if patient.norms.notes:
        raise RemedyError(patient.norms.notes[0])
    found: dict[str, list[Norm]] = {}
    for norm in patient.norms:
        if norm.role not in roles:
            continue
        if not norm.path:
            raise RemedyError(f"a norm of {norm.stack} layer {norm.layer} of this {name} is no module: {why}.")
        found.setdefault(norm.path, []).append(norm)
    if not found:
        there = {"read": "before a branch", "sum": "after the sum", "branch": "on what a branch adds"}
        wanted = " or ".join(there.get(role, "after the last block") for role in roles)
        raise RemedyError(f"this {name} has no norm {wanted}: {why}.")
    return {path: tuple(norms) for path, norms in found.items()}


def without_norms(patient: Patient) -> Iterator[Edit]:
    """Take the norms out of the blocks; the one after the last block stays.

    Args:
        patient: the model.

    Yields:
        Edits; none where blocks have no norms.

    Raises:
        RemedyError: where one is no module, or it is not known which there are.
    """
    if not patient.norms.notes and not any(norm.role != "final" for norm in patient.norms):
        return
    for path in norms_in(patient, "read", "sum", "branch", why="it cannot be taken out; use norms=keep"):
        yield replace_module(patient.model, path, as_given)


def as_given(run: Callable[..., Any], X: Any, *args: Any, **kwargs: Any) -> Any:
    """The state in the place of its norm."""
    return X
