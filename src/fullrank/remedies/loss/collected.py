"""Terms of the loss that are collected during a forward, and added to the loss that a model returns."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.tap import recomputing
from fullrank.capture.wrappers import bare
from fullrank.edit import Edit
from fullrank.edit.forwards import EditedForward, Enclosed
from fullrank.edit.handle import make
from fullrank.edit.registered import Added, refuse_wrapped
from fullrank.remedies.patient import Patient
from fullrank.remedies.penalty import Penalty

__all__ = ["LATEST", "Collected", "added_to_loss"]

LATEST = (
    "`repair.penalty()` is of the latest forward: a forward under no_grad, or of another batch, between the one that "
    "is differentiated and the call leaves nothing, or another term; take it right after the forward."
)
"""A limit of every such term."""


class Collected(Penalty):
    """A weighted mean of terms that parts of the model put down while it runs.

    Args:
        weight: λ.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self._terms: dict[Hashable, Tensor] = {}

    def forget(self) -> None:
        """Keep nothing of the forward before."""
        super().forget()
        self._terms = {}

    def put(self, key: Hashable, *made: Any) -> None:
        """Make a term and keep it: in forwards with gradients; and once, where checkpointing repeats them.

        Args:
            key: of the place it is made at.
            *made: what it is made from.
        """
        if not torch.is_grad_enabled():
            return
        term = self.term(key, *made)  # made again in a repetition: what is saved for it is counted there
        if torch.compiler.is_compiling() or not recomputing():
            self._terms = {**self._terms, key: term}

    @abstractmethod
    def term(self, key: Hashable, *made: Any) -> Tensor:
        """One term, a scalar."""

    def value(self) -> Tensor | None:
        """λ times the mean of the terms."""
        terms = list(self._terms.values())
        if not terms:
            return None
        dtype = torch.promote_types(terms[0].dtype, torch.float32)
        return self.weight * torch.stack([term.to(terms[0].device, dtype) for term in terms]).mean()

    def __getstate__(self) -> dict[str, Any]:
        """Without the terms: a copy of a model has no forward behind it."""
        return {**self.__dict__, "_terms": {}, "in_loss": False}


class _AddedToLoss:
    """Around the model: forgets the terms of the forward before, and adds those of this one to its loss in training."""

    what = "add to the loss"

    def __init__(self, penalty: Collected) -> None:
        self.penalty = penalty

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        """Run the model's forward."""
        self.penalty.forget()
        output = run(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        term = self.penalty.value() if forward.module.training else None
        if term is None or not isinstance(loss, Tensor):
            return output
        changed = _with_loss(output, loss + term.to(loss))
        self.penalty.in_loss = changed is not None
        return output if changed is None else changed


def _with_loss(output: Any, loss: Tensor) -> Any:
    """What a model returns, with another loss; None where it takes none."""
    if isinstance(output, MutableMapping):
        output["loss"] = loss
        return output
    if isinstance(output, Mapping):
        return None
    if isinstance(output, tuple):
        named = "loss" in getattr(output, "_fields", ())
        return output._replace(loss=loss) if named else None  # type: ignore[attr-defined]
    try:
        if getattr(getattr(output, "__dataclass_params__", None), "frozen", False):
            return dataclasses.replace(output, loss=loss)
        output.loss = loss
    except (AttributeError, TypeError, ValueError):  # a property; a field that is not of `__init__`, or wants more
        return None
    return output


def added_to_loss(patient: Patient, name: str, penalty: Collected) -> Edit:
    """Make a penalty a child of the model, and add it to the loss that the model returns in training.

    Args:
        patient: the model.
        name: of the remedy; the child is `fullrank_<name>`.
        penalty: the penalty.

    Returns:
        The handle.
    """
    model = bare(patient.model)
    own = list(penalty.parameters())
    if own:
        refuse_wrapped(patient.model, penalty)
    beside = next((p for p in model.parameters() if p.is_floating_point()), None)
    if beside is not None:
        penalty.to(device=beside.device, dtype=beside.dtype if beside.dtype.itemsize > 1 else None)
    child = "fullrank_" + name.replace("-", "_")
    changes = [lambda: Added(model, child, penalty), lambda: Enclosed(model, _AddedToLoss(penalty))]
    return make(name, [child], changes, sum(p.numel() for p in own))  # type: ignore[arg-type]
