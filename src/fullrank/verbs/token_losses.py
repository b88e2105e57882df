"""The model's own loss by position: how well it says the next token after how many."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fullrank import metrics
from fullrank.capture.anatomy import Stack
from fullrank.capture.events import Event, Signal
from fullrank.diagnosis.outcomes import loss_in
from fullrank.measure.contexts import Reading
from fullrank.measure.positions import real_or_all
from fullrank.measure.samples import Place, Samples
from fullrank.metrics.rows import mean_over_rows
from fullrank.spec.quiet import quiet
from fullrank.table import Row
from fullrank.verbs.batches import Call

__all__ = ["loss_readings"]

_SAME = 1e-3  # nats, or relative: what another order of summation, or of rounding, may change
_SHORT = "no token of this scope has a next one"


def loss_readings(model: nn.Module, calls: Sequence[Call], stack: Stack, contexts: Sequence[int]) -> list[Reading]:
    """`token_loss` of what late tokens of each context say of the next one, per sequence.

    It is taken of the logits that the model returns, and only where the model's own loss is what they give: with the
    labels of the batch, or with its tokens as labels where it has none. Costs a forward of every call, and one of a
    single sequence where the batch has no labels.

    Args:
        model: in the state it is looked at.
        calls: what it is called with.
        stack: whose tokens are predicted, causal.
        contexts: tokens, rising.

    Returns:
        What was seen at each context; numbers without a value, with the reason, where the loss cannot be seen.
    """
    place = Place(stack.name, len(stack.paths), "stream", "out")
    gathered = [_Gathered() for _ in contexts]
    places: list[Tensor] = []
    why = ""
    for call in calls:
        start = sum(map(len, places))
        places.append(torch.arange(start, start + call.sequences))
        losses = why or _losses(model, call)
        why = losses if isinstance(losses, str) else ""
        for context, one in zip(contexts, gathered, strict=True):
            missing = torch.full((call.sequences,), torch.nan)
            late = missing if isinstance(losses, str) else _late(call, losses, context)
            one.samples.add(place, "token_loss", late, scope="late", undefined=why or _SHORT)
    return [
        Reading(context, [one], {stack.name: places}, frozenset({stack.name}))
        for context, one in zip(contexts, gathered, strict=True)
    ]


class _Gathered:
    """The values of one context, as those of observers are held."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self) -> None:
        self.samples = Samples()

    def see(self, event: Event) -> None:
        """Nothing of a forward's inside is looked at."""

    def rows(self) -> list[Row]:
        """The numbers gathered."""
        return self.samples.rows()

    def merge(self, other: _Gathered) -> None:
        """Take in other sequences."""
        self.samples.merge(other.samples)


def _late(call: Call, losses: Tensor, context: int) -> Tensor:
    """Mean per sequence over tokens in the later half of the first `context` real ones, whatever the padding."""
    real = _real(call, losses.shape[0], losses.shape[1] + 1).to(losses.device)
    position = real.cumsum(-1)
    long = position[:, -1:] >= context
    asked = real & (position <= context) & (2 * position > context) & long
    return mean_over_rows(losses, asked[:, :-1] & real[:, 1:])


def _real(call: Call, sequences: int, tokens: int) -> Tensor:
    given = call.real if isinstance(call.real, Tensor) else None
    return real_or_all(given, sequences, tokens, torch.device("cpu") if given is None else given.device)


def _losses(model: nn.Module, call: Call) -> Tensor | str:
    """Cross-entropy of every token but the last with the next one, (sequences, tokens − 1); or why it is not known."""
    ids, labels = call.token_ids, call.kwargs.get("labels")
    if ids is None or isinstance(call.real, dict):
        return "the batch holds no sequences of token ids"
    output = call.run(model)
    logits = _logits(output)
    if logits is None or logits.shape[:2] != ids.shape:
        return "the model returns no logits of every token"
    if labels is not None and not (isinstance(labels, Tensor) and labels.shape == ids.shape):
        return "the labels of the batch are not one word for each token"
    real = _real(call, *ids.shape).to(ids.device)
    targets = (ids.masked_fill(~real, -100) if labels is None else labels).to(logits.device)
    if int(targets.max()) >= logits.shape[-1]:
        return "the model's logits are not of the words that it reads"
    losses = metrics.token_losses(logits[:, :-1], targets[:, 1:])
    if labels is None:
        call = call.part(0, 1) if call.divisible else call
        targets = targets[: call.sequences]
        try:
            with quiet() if "transformers" in sys.modules else nullcontext():  # what nobody asked for is not talked of
                output = replace(call, kwargs={**call.kwargs, "labels": targets}).run(model)
        except Exception:  # noqa: BLE001 - whatever it raises, it does not take its tokens as labels
            return "the model takes no labels, so that its own loss is not known"
    own, ours = loss_in(output), float(losses[: call.sequences].nanmean())
    if own is None:
        return "the model returns no loss of its own"
    if not abs(float(own) - ours) <= _SAME * max(1.0, abs(ours)):
        return f"the model's own loss ({float(own):.4g}) is not that of its logits for the next token ({ours:.4g})"
    return losses


def _logits(output: object) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.ndim == 3 and found.is_floating_point() else None
