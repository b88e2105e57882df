"""Terms of the loss that are collected during a forward, and added to the loss that a model returns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
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

__all__ = ["Collected", "added_to_loss"]


class Collected(Penalty):
    """A weighted mean of terms that parts of the model put down while it runs.

    Args:
        weight: λ.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self._terms: dict[Hashable, Tensor] = {}
        self._real: Tensor | None = None

    def begin(self, real: Tensor | None) -> None:
        """A forward begins.

        Args:
            real: (sequences, tokens), which tokens are no padding, where the model is told.
        """
        self.forget()
        self._real = real

    def forget(self) -> None:
        """Keep nothing of the forward before."""
        super().forget()
        self._terms = {}
        self._real = None

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

    def real(self, batch: int, tokens: int) -> Tensor | None:
        """(batch, tokens) bool, which tokens are no padding; None where nothing of this form was told."""
        told = self._real
        return None if told is None or tuple(told.shape) != (batch, tokens) else told.bool()

    def value(self) -> Tensor | None:
        """λ times the mean of the terms."""
        terms = list(self._terms.values())
        if not terms:
            return None
        dtype = torch.promote_types(terms[0].dtype, torch.float32)
        return self.weight * torch.stack([term.to(terms[0].device, dtype) for term in terms]).mean()

    def __getstate__(self) -> dict[str, Any]:
        """Without the terms: a copy of a model has no forward behind it."""
        return {**self.__dict__, "_terms": {}, "_real": None, "in_loss": False}


class _AddedToLoss:
    """Around the model: forgets the terms of the forward before, and adds those of this one to its loss in training."""

    what = "add to the loss"

    def __init__(self, penalty: Collected) -> None:
        self.penalty = penalty

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        """Run the model's forward."""
        told = kwargs.get("attention_mask")
        self.penalty.begin(told if isinstance(told, Tensor) and told.ndim == 2 else None)
        output = run(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        term = self.penalty.value() if forward.module.training else None
        if term is None or not isinstance(loss, Tensor):
            return output
        self.penalty.in_loss = True
        if isinstance(output, dict):
            output["loss"] = loss + term.to(loss)
        else:
            output.loss = loss + term.to(loss)
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
