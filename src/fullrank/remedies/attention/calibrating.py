"""Modules whose values are found on the batch at which a remedy is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.edit import Call
from fullrank.remedies.patient import Patient

__all__ = ["Calibrated", "calibrate"]


class Calibrated(nn.Module, ABC):
    """A module of an attention call with one value per head, which may be measured on the first call that it sees.

    Args:
        heads: how many.
        start: the value at first.
        learnable: whether it is a parameter; a buffer otherwise.
    """

    per_head: Tensor

    def __init__(self, heads: int, start: float, *, learnable: bool) -> None:
        super().__init__()
        value = torch.full((heads,), start)
        if learnable:
            self.per_head = nn.Parameter(value)
        else:
            self.register_buffer("per_head", value)
        self.pending = False
        self.found: Tensor | None = None

    @abstractmethod
    def measure(self, call: Call) -> Tensor:
        """The value per head, of a call as the model makes it."""

    def present(self, call: Call) -> Tensor:
        """The value per head, measured first where that is still to be done."""
        if not self.pending:
            return self.per_head
        if self.found is None:
            self.found = self.measure(call)
        return self.found


def calibrate(patient: Patient, modules: Iterable[Calibrated]) -> None:
    """Let modules measure in one forward, in its order: each sees what those before it make of the stream.

    Args:
        patient: the model, with the modules in place.
        modules: those that are to measure.
    """
    chosen = list(modules)
    for one in chosen:
        one.pending = True
    try:
        with undisturbed(patient.model), torch.no_grad():
            patient.forward()
        with torch.no_grad():
            for one in chosen:
                if one.found is not None:
                    one.per_head.copy_(one.found)
    finally:
        for one in chosen:
            one.pending, one.found = False, None
