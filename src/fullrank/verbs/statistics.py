"""Which statistics the batch norms of an examined network used, in a sentence."""

from __future__ import annotations

from torch import nn

from fullrank.capture.undisturbed import batch_norms

__all__ = ["statistics_notes"]

_BATCH = "the {count} batch norms used the mean and variance of each batch they were given, as in training."
_RUNNING = (
    "the {count} batch norms used their running mean and variance, as in evaluation; batch_statistics=True takes those "
    "of the batch."
)
_UNTRAINED = (
    "no batch norm of this model has seen a batch in training: with their initial running mean 0 and variance 1 the "
    "{count} of them do nothing but scale and shift; batch_statistics=True takes the mean and variance of the batch."
)
_NONE = "batch_statistics=True changes nothing: this model has no batch norm with running statistics."


def statistics_notes(model: nn.Module, *, batch_statistics: bool) -> list[str]:
    """A sentence where the model has batch norms, or where batch statistics were asked for in vain.

    Args:
        model: the model.
        batch_statistics: whether the batch's own were asked for.

    Returns:
        None or one sentence.
    """
    norms = batch_norms(model)
    if not norms:
        return [_NONE] if batch_statistics else []
    counters = [getattr(norm, "num_batches_tracked", None) for norm in norms]
    fresh = all(counter is not None and not counter.is_meta and int(counter) == 0 for counter in counters)
    sentence = _BATCH if batch_statistics else _UNTRAINED if fresh else _RUNNING
    return [sentence.format(count=len(norms))]
