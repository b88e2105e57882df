"""Half-precision weights trained through copies of single precision, so that small steps add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Masters"]


@dataclass(frozen=True)
class Masters:
    """What an optimiser works on in a model's stead.

    A step smaller than half the spacing of numbers is lost on the weight itself (bfloat16 at 1: 2⁻⁸ below and 2⁻⁷
    above). A float32 copy keeps it: the model computes with the copy rounded, the gradient is handed to the copy.
    Gradients are not scaled, so that those of float16 below 6·10⁻⁸ are 0. Costs 4 bytes for each such weight, and as
    much for its gradient.

    Attributes:
        weights: the model's own.
        held: what is optimised in their place: copies of those below 32 bits, the others themselves.
    """

    weights: tuple[nn.Parameter, ...]
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, weights: Sequence[nn.Parameter]) -> Masters:
        """Of a model's weights, as they are now."""
        held = [one.detach().float().requires_grad_() if _is_small(one) else one for one in weights]
        return cls(tuple(weights), tuple(held))

    def take_gradients(self) -> None:
        """Hand each copy its weight's gradient, and free that one."""
        for weight, master in zip(self.weights, self.held, strict=True):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
                weight.grad = None

    @torch.no_grad()
    def give_values(self) -> None:
        """Round each copy into its weight."""
        for weight, master in zip(self.weights, self.held, strict=True):
            if master is not weight:
                weight.copy_(master)


def _is_small(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() < 4
