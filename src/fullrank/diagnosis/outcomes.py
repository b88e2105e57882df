"""What an intervention is measured by: one number for each document, from what the changed model returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.tensors import first_state
from fullrank.report.verdict import Outcome

__all__ = ["Losses", "Measured", "Unmeasured", "finite", "logits_in", "loss_in", "outcome_of"]


class Unmeasured(Exception):  # noqa: N818 - a reason on its way to a sentence, never shown as an error
    """Why the outcome cannot be taken."""


class Measured(ABC):
    """One outcome over the runs of a model; the unchanged ones are seen first, in order."""

    name: ClassVar[Outcome]
    apart: ClassVar[bool] = False
    """Whether documents must be run one by one, because a run gives one number."""

    @abstractmethod
    def see(self, output: Any, sequences: int, real: Tensor | Mapping[str, Tensor] | None) -> None:
        """Take in what the unchanged model returned in the next run.

        Args:
            output: of the model.
            sequences: in the batch.
            real: (sequences, tokens), by stack where the stacks differ; None when all tokens are.
        """

    @abstractmethod
    def changes(self, run: int, output: Any) -> Tensor:
        """What has changed, (documents of this run,), in float64, given what the changed model returned."""

    @property
    @abstractmethod
    def documents(self) -> int:
        """How many documents were seen."""

    @property
    def baseline(self) -> float | None:
        """The mean of the unchanged number, where it means something by itself."""
        return None

    @property
    @abstractmethod
    def words(self) -> str:
        """What is measured, for the reader of a report."""


def outcome_of(output: Any, anatomy: Anatomy, *, apart: bool = True) -> Outcome:
    """By what interventions on a model are measured, given what it returned unchanged.

    Its own loss where it returns one, else its output distribution where it has logits, else its final state.

    Args:
        output: of the model.
        anatomy: of the model.
        apart: whether there are several runs of a document each: a loss is one number per run.

    Returns:
        The outcome.
    """
    if apart and loss_in(output) is not None:
        return "loss"
    return "distribution" if logits_in(output, anatomy) is not None else "state"


def loss_in(output: Any) -> Tensor | None:
    """The loss in what a model returned: `.loss`, `["loss"]`, a single number, or a single number as the first item."""
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and not isinstance(output, Mapping):
        found = output[0] if isinstance(output, tuple | list) and output else output
    single = isinstance(found, Tensor) and found.numel() == 1 and found.ndim <= 1 and found.is_floating_point()
    return found if single else None


def logits_in(output: Any, anatomy: Anatomy) -> Tensor | None:
    """The logits in what a model returned: `.logits`, `["logits"]`, or a tensor (the first item) of another width.

    Args:
        output: of the model.
        anatomy: its streams are no logits.

    Returns:
        (…, classes) with two classes or more, in two or three dimensions; None where there are none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    elif found is None:
        found = first_state(output)
        if found is not None and found.shape[-1] in {stack.width for stack in anatomy.stacks}:
            return None
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim not in (2, 3):
        return None
    return found if found.shape[-1] > 1 else None


class Losses(Measured):
    """The model's own loss, in nats: changed minus unchanged. One document per run."""

    name = "loss"
    apart = True

    def __init__(self) -> None:
        self._unchanged: list[Tensor] = []

    def see(self, output: Any, sequences: int, real: Tensor | Mapping[str, Tensor] | None) -> None:
        """Take in one loss."""
        self._unchanged.append(finite(_loss(output)))

    def changes(self, run: int, output: Any) -> Tensor:
        """The difference."""
        return (_loss(output) - self._unchanged[run]).reshape(1)

    @property
    def documents(self) -> int:
        """One per run."""
        return len(self._unchanged)

    @property
    def baseline(self) -> float | None:
        """Mean over documents."""
        return float(torch.stack(self._unchanged).mean())

    @property
    def words(self) -> str:
        """What is measured."""
        return f"the model's own loss, over {self.documents} documents run one by one"


def _loss(output: Any) -> Tensor:
    found = loss_in(output)
    if found is None:
        raise Unmeasured("the model returns a loss for some batches only.")
    return found.detach().double().reshape(())


def finite(tensor: Tensor) -> Tensor:
    """A tensor of the unchanged model, looked at.

    Returns:
        It.

    Raises:
        Unmeasured: where something in it is not finite.
    """
    if not bool(tensor.isfinite().all()):
        raise Unmeasured("the unchanged model's output is not finite.")
    return tensor
