"""How far the final state has moved, document by document, by its own variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.tensors import first_state
from fullrank.diagnosis.by_document import by_document, real_outputs
from fullrank.diagnosis.outcomes import Measured, Unmeasured, finite

__all__ = ["States"]


class States(Measured):
    """Σ‖x'−x‖² over a document's real tokens, by the mean over documents of Σ‖x−x̄‖², x̄ the mean token of all.

    Args:
        anatomy: of the model.
    """

    name = "state"

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._kept: list[list[tuple[Tensor, Tensor]]] = []  # by run and document: which tokens, and their states
        self._scale: Tensor | None = None

    def see(self, output: Any, sequences: int, real: Tensor | Mapping[str, Tensor] | None) -> None:
        """Keep the states of real tokens."""
        states = by_document(_state(output), sequences, self._anatomy)
        mask = real_outputs(real, states, self._anatomy)
        self._kept.append([(which, finite(state[which])) for state, which in zip(states, mask, strict=True)])

    def changes(self, run: int, output: Any) -> Tensor:
        """What is lost of the states' variance."""
        states = by_document(_state(output), len(self._kept[run]), self._anatomy)
        pairs = zip(self._kept[run], states, strict=True)
        lost = [(changed[which].double() - state.double()).square().sum() for (which, state), changed in pairs]
        return torch.stack(lost) / self._variance()

    def _variance(self) -> Tensor:
        if self._scale is None:
            states = [state for run in self._kept for _, state in run]
            mean = torch.stack([state.sum(0, dtype=torch.float64) for state in states]).sum(0) / sum(map(len, states))
            total = torch.stack([(state.double() - mean).square().sum() for state in states])
            if not bool(total.sum() > 0):
                raise Unmeasured("the final state is the same for all tokens of all documents.")
            self._scale = total.mean()
        return self._scale

    @property
    def documents(self) -> int:
        """Over all runs."""
        return sum(map(len, self._kept))

    @property
    def words(self) -> str:
        """What is measured."""
        return (
            f"the change of the final state, by its variance over tokens and documents, of {self.documents} documents"
        )


def _state(output: Any) -> Tensor:
    found = first_state(output)
    if found is None:
        raise Unmeasured("the model returns no tensor that could be its last state.")
    return found
