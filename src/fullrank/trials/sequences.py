"""A batch's sequences: how many there are, one by one, the first few, and which of them surely have a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.own_copy import own_copy

__all__ = ["IGNORED", "cut", "have_targets", "labels_in", "parts_of", "run", "sequences_in"]

IGNORED = -100  # torch's own mark of a place without a target


def run(model: Any, batch: Any) -> Any:
    """The model's output for a batch, a list being its arguments as a tuple is; no cache is grown."""
    if isinstance(batch, Mapping):
        return model(**{name: own_copy(value) for name, value in batch.items()})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def sequences_in(batch: Any) -> int:
    """How many sequences a batch holds; 1 where its tensors' first axes differ, so that it cannot be split."""
    sizes = {tensor.shape[0] for tensor in _tensors(batch)}
    return sizes.pop() if len(sizes) == 1 else 1


def parts_of(batch: Any) -> list[Any]:
    """A batch's sequences one by one; tensors have them first. A batch that cannot be split is its own only part."""
    if len({tensor.shape[0] for tensor in _tensors(batch)}) != 1:
        return [batch]
    return [_slice(batch, at, at + 1) for at in range(sequences_in(batch))]


def cut(batch: Any, most: int) -> Any:
    """A batch's first sequences, or the batch itself where it has no more or cannot be split."""
    return _slice(batch, 0, most) if sequences_in(batch) > most else batch


def labels_in(batch: Any) -> Tensor | None:
    """The integer labels of a mapping, (sequences,) or (sequences, tokens); None where there are none or several."""
    named = batch.items() if isinstance(batch, Mapping) else ()
    found = [value for name, value in named if "label" in str(name) and _whole(value)]
    return found[0] if len(found) == 1 and found[0].ndim in (1, 2) else None


def have_targets(batch: Any) -> Tensor:
    """Which sequences surely have something to be judged by, seen from the batch alone, (sequences,).

    A sequence has nothing where its labels are all −100, or where it is a single real token. One whose only label is at
    the first place may have none, since a model that reads from left to right is not judged there.

    Args:
        batch: what the loss is taken of.

    Returns:
        Whether each surely has; in doubt it has.
    """
    found = torch.ones(sequences_in(batch), dtype=torch.bool)
    named = dict(batch) if isinstance(batch, Mapping) else {}
    targets = [value for name, value in named.items() if "label" in str(name)]
    if isinstance(batch, tuple | list):
        targets = list(batch[1:])
    told = [value for value in targets if _whole(value) and len(value) == len(found)]
    if told and len(told) == len([value for value in targets if isinstance(value, Tensor)]):
        marked = [(value[:, 1:] if value.ndim > 1 and value.shape[1] > 1 else value) != IGNORED for value in told]
        found = torch.stack([one.flatten(1).any(1) if one.ndim > 1 else one for one in marked]).any(0).cpu()
    mask = named.get("attention_mask")
    if not told and isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == len(found):
        found = found & ((mask != 0).sum(1) > 1).cpu()
    return found


def _whole(value: Any) -> bool:
    integers = (torch.int8, torch.int16, torch.int32, torch.int64)
    return isinstance(value, Tensor) and value.ndim > 0 and value.dtype in integers


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _slice(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim else value
    if isinstance(value, Mapping):
        return {name: _slice(one, start, stop) for name, one in value.items()}
    if isinstance(value, tuple | list):
        made = [_slice(one, start, stop) for one in value]
        if isinstance(value, list):
            return made
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value
