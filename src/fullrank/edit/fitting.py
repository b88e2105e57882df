"""What takes the place of a tensor, in its shape, type and place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fullrank.errors import EditError

__all__ = ["StateValue", "broadcasts", "new_value"]

StateValue = Tensor | float | Callable[[Tensor], Tensor]
"""What takes the place of a tensor: a tensor that broadcasts to it, a number, or a function of it."""


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def new_value(value: StateValue, seen: Tensor, what: str) -> Tensor:
    """What takes the place of a tensor.

    Args:
        value: a tensor, a number or a function.
        seen: the tensor whose place it takes.
        what: what that is, for the error.

    Returns:
        The new tensor.

    Raises:
        EditError: where it does not broadcast.
    """
    new = value(seen) if callable(value) else value
    if not isinstance(new, Tensor):
        return torch.full_like(seen, new)
    if not broadcasts(new.shape, seen.shape):
        raise EditError(f"{what} is {tuple(seen.shape)}, and the value for it is {tuple(new.shape)}.")
    return new.to(device=seen.device, dtype=seen.dtype).expand(seen.shape)
