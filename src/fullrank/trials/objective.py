"""Where the loss of a trial comes from: a task's targets, the model's own loss, its next tokens, or yours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank import metrics
from fullrank.diagnosis.outcomes import loss_in
from fullrank.errors import TrialError
from fullrank.trials.sequence_losses import by_logits, of_sure, of_targets
from fullrank.trials.sequences import IGNORED, have_targets, labels_in, parts_of, run

__all__ = [
    "Example",
    "Judged",
    "NextToken",
    "Objective",
    "OwnLoss",
    "TargetLoss",
    "YourLoss",
    "objective_for",
    "outputs",
]

LossFunction = Callable[[nn.Module, Any], Tensor]


class Example(NamedTuple):
    """A batch of a built-in task.

    Attributes:
        batch: what the model is called with: a mapping, a tuple or a tensor.
        targets: the answers: (sequences, tokens) or (sequences,) integers.
    """

    batch: Any
    targets: Tensor


class Judged(NamedTuple):
    """What a batch lost.

    Attributes:
        loss: with a history, one number.
        logits: (…, classes) that it was taken of; None where they are not known.
    """

    loss: Tensor
    logits: Tensor | None


class Objective(ABC):
    """A loss of a model on a batch."""

    readout: nn.Module | None = None
    """Trained along with the model where its outputs are no logits."""

    @abstractmethod
    def of(self, model: nn.Module, batch: Any) -> Judged:
        """The mean loss of a batch, with a history."""

    def each(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of every sequence of a batch alone, (sequences,), of those that have a target.

        The model is called for one after the other.

        Args:
            model: as it stands.
            batch: whatever the loss is taken of.

        Returns:
            NaN for a sequence with targets on which the model gave no number; a sequence that may have no target, and
            whose loss is NaN, is left out.
        """
        losses = [self.of(model, part).loss.detach().double() for part in parts_of(batch)]
        if not losses:
            return torch.empty(0, dtype=torch.float64)
        return of_sure(torch.stack(losses), have_targets(batch))

    def judges(self, batch: Any) -> bool:
        """Whether a batch surely has a target in it, seen from the batch alone."""
        return bool(have_targets(batch).any())


@dataclass(frozen=True)
class TargetLoss(Objective):
    """Cross-entropy of the first len(targets) logits with the targets of an `Example`.

    Attributes:
        readout: a linear map from states to logits, where the model returns states; None where it returns logits.
        tokens_first: whether the first axis of what the model returns holds tokens and its second sequences.
    """

    readout: nn.Module | None = None
    tokens_first: bool = False

    def of(self, model: nn.Module, batch: Example) -> Judged:
        """The mean over all targets."""
        logits = self._logits(model, batch)
        return Judged(functional.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten()), logits)

    def each(self, model: nn.Module, batch: Example) -> Tensor:
        """Of one forward: sequences do not see each other."""
        losses = metrics.token_losses(self._logits(model, batch).detach(), batch.targets).double()
        return of_targets(losses, batch.targets)

    def judges(self, batch: Example) -> bool:
        """Whether there is a target."""
        return bool((batch.targets >= 0).any())

    def _logits(self, model: nn.Module, batch: Example) -> Tensor:
        found = outputs(run(model, batch.batch))
        if found is None:
            raise TrialError(f"{type(model).__name__} returns neither logits nor states, so that nothing can be read.")
        found = found.transpose(0, 1) if self.tokens_first and found.ndim == 3 else found
        if batch.targets.ndim == 1 and found.ndim == 3:
            found = found.mean(1)
        if self.readout is not None:
            found = self.readout(found)
        return found[:, : batch.targets.shape[1]] if batch.targets.ndim == 2 else found


@dataclass(frozen=True)
class OwnLoss(Objective):
    """The loss that the model returns for batches with labels."""

    def of(self, model: nn.Module, batch: Any) -> Judged:
        """As the model says."""
        output = run(model, batch)
        loss = loss_in(output)
        if loss is None:
            with_labels = isinstance(batch, Mapping) and "labels" in batch
            raise TrialError(
                f"{type(model).__name__} returned no loss {'for' if with_labels else 'and'} the batch "
                f"{'with labels' if with_labels else 'holds no labels'}; pass loss_fn(model, batch)."
            )
        return Judged(loss, logits_in(output))

    def each(self, model: nn.Module, batch: Any) -> Tensor:
        """Of one forward where the model's loss is seen to be the cross-entropy of its logits with the labels.

        With those of the same place, as encoders do, or of the next one, as models that read from left to right. For
        other losses the model is called for one sequence after the other.

        Args:
            model: as it stands.
            batch: with labels.

        Returns:
            Those of the sequences that have a target.
        """
        labels = labels_in(batch)
        if labels is not None:
            judged = self.of(model, batch)
            found = by_logits(judged.loss.detach(), judged.logits, labels)
            if found is not None:
                return found
        return super().each(model, batch)


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of every token but the last with the next one, where they are real.

    The rule of `examine`'s `token_loss`: of logits of every token, over the words that the model reads.
    """

    def of(self, model: nn.Module, batch: Any) -> Judged:
        """The mean over all tokens that have a next one."""
        logits, targets = self._both(model, batch)
        return Judged(functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), logits)

    def each(self, model: nn.Module, batch: Any) -> Tensor:
        """Of one forward: the mean of each sequence's tokens."""
        logits, targets = self._both(model, batch)
        return of_targets(metrics.token_losses(logits.detach(), targets).double(), targets)

    def judges(self, batch: Any) -> bool:
        """Whether a token has a next one."""
        ids, real = _ids(batch)
        return not isinstance(ids, Tensor) or ids.ndim != 2 or bool((_next(ids, real) >= 0).any())

    def _both(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        ids, real = _ids(batch)
        logits = outputs(run(model, batch))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or logits is None or logits.shape[:2] != ids.shape:
            raise TrialError(
                "without labels the loss is that of the next token, and this batch or these outputs are no "
                "sequences of token ids with logits of each; put labels into the batches or pass loss_fn(model, batch)."
            )
        targets = _next(ids, real)
        if targets.numel() and int(targets.max()) >= logits.shape[-1]:
            raise TrialError("the model's logits are not of the words that it reads; put labels into the batches.")
        return logits[:, :-1], targets


@dataclass(frozen=True)
class YourLoss(Objective):
    """A function of model and batch.

    Attributes:
        function: gives one number with a history.
    """

    function: LossFunction

    def of(self, model: nn.Module, batch: Any) -> Judged:
        """As the function says."""
        loss = self.function(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TrialError(f"loss_fn returned {_said(loss)}; it must return one number that depends on the model.")
        return Judged(loss.reshape(()), None)


def objective_for(batch: Any, *, loss: Objective | LossFunction | None, causal: bool) -> Objective:
    """The loss of a user's batches.

    Args:
        batch: one of them.
        loss: an objective, or a function of model and batch; None for what the batch itself says.
        causal: whether the model reads from left to right, so that batches without labels have a next token.

    Returns:
        The objective.

    Raises:
        TrialError: where there is no loss to be had.
    """
    if isinstance(loss, Objective):
        return loss
    if loss is not None:
        return YourLoss(loss)
    if isinstance(batch, Example):
        return TargetLoss()
    if isinstance(batch, Mapping) and any("label" in str(name) for name in batch):
        return OwnLoss()
    if causal:
        return NextToken()
    raise TrialError(
        "the batches hold no labels and the model sees whole sequences, so that no loss is known; put labels into the "
        "batches or pass loss_fn(model, batch)."
    )


def logits_in(output: Any) -> Tensor | None:
    """The logits by name, or None."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def outputs(output: Any) -> Tensor | None:
    """What a model returned that a loss can be taken of: logits, else its last state, else the only or first tensor."""
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.is_floating_point() and found.ndim in (2, 3):
            return found
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() and first.ndim in (2, 3) else None


def _ids(batch: Any) -> tuple[Any, Any]:
    """Token ids and, where there is one, the mask of those that are real."""
    if isinstance(batch, Mapping):
        return batch.get("input_ids"), batch.get("attention_mask")
    return (batch[0] if isinstance(batch, tuple | list) and batch else batch), None


def _next(ids: Tensor, real: Any) -> Tensor:
    return (ids if real is None else ids.masked_fill(real == 0, IGNORED))[:, 1:]


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
