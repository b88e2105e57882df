"""The loss of every sequence that has a target: a mean over its own targets, and never one over nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.trials.sequences import IGNORED

__all__ = ["by_logits", "of_sure", "of_targets"]


def of_sure(losses: Tensor, sure: Tensor) -> Tensor:
    """Losses without those of sequences that may have no target and indeed gave none: `sure` says which have one."""
    return losses[sure.to(losses.device) | ~losses.isnan()] if len(sure) == len(losses) else losses


def of_targets(losses: Tensor, targets: Tensor) -> Tensor:
    """The mean of each sequence over its targets, of the sequences that have one; NaN there stays."""
    there = targets >= 0
    if losses.ndim == 1:
        return losses[there]
    mean = losses.where(there, torch.zeros_like(losses)).sum(-1) / there.sum(-1)
    return mean[there.any(-1)]


def by_logits(loss: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor | None:
    """The loss of every sequence from the logits, where just one rule gives the loss of them all."""
    if logits is None or logits.shape[: labels.ndim] != labels.shape or logits.ndim != labels.ndim + 1:
        return None
    if not logits.shape[-1] > int(labels.max()) or bool(((labels < 0) & (labels != IGNORED)).any()):
        return None
    logits, labels = logits.detach(), labels.to(logits.device)
    rules = [(logits, labels)] + ([(logits[:, :-1], labels[:, 1:])] if labels.ndim == 2 else [])
    found = []
    for said, targets in rules:
        losses = metrics.token_losses(said, targets).double()
        if abs(float(losses.nanmean()) - float(loss)) <= 1e-5 * max(1.0, abs(float(loss))):
            found.append(of_targets(losses, targets))
    return found[0] if len(found) == 1 else None
