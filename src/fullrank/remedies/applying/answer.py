"""What a model answers to one forward, and whether two answers are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed

__all__ = ["answer_of", "floating_in", "same"]


def answer_of(model: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The first floating tensor that a forward returns, in evaluation mode; the model is left as it was.

    Returns:
        A copy, in float32 or wider; empty where nothing floating is returned.
    """
    with undisturbed(model), torch.no_grad():
        found = next(floating_in(forward()), None)
    if found is None:
        return torch.zeros(0)
    return found.detach().to(torch.float64 if found.dtype == torch.float64 else torch.float32).clone()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two answers are the same number for number; NaN is the same as NaN."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def floating_in(output: Any) -> Iterator[Tensor]:
    """The floating tensors in what a forward returns, in their order; none without axes, as losses are."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim > 0:
            yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from floating_in(item)
    elif isinstance(output, tuple | list):
        for item in output:
            yield from floating_in(item)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from floating_in(getattr(output, name))
