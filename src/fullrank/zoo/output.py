"""What models of the zoo return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from fullrank.errors import BatchError

__all__ = ["Prediction", "loss_of"]


class Prediction(NamedTuple):
    """Logits, and the loss where labels were given.

    Attributes:
        logits: (sequences, tokens, vocabulary), or (sequences, classes).
        loss: mean cross-entropy in nats over labels that are not -100; None without labels.
    """

    logits: Tensor
    loss: Tensor | None = None


def loss_of(logits: Tensor, labels: Tensor | None, *, shifted: bool) -> Tensor | None:
    """Mean cross-entropy; a label of -100 is left out.

    Args:
        logits: (…, classes).
        labels: (…); None for no loss.
        shifted: whether logits of a token are held against the label of the next one.

    Returns:
        A single number in nats, or None.

    Raises:
        BatchError: for labels of another shape.
    """
    if labels is None:
        return None
    if labels.shape != logits.shape[:-1]:
        raise BatchError(f"labels have the shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}.")
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
