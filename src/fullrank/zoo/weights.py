"""Drawing weights from a generator of one's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["draw", "draw_linear"]


@torch.no_grad()
def draw(W: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Independent normal entries of mean 0, the same on every device and, but for rounding, in every dtype.

    Args:
        W: filled in place.
        std: standard deviation.
        generator: on the CPU; None for torch's own, on the device of `W`, as modules of torch draw.
    """
    if generator is None:
        W.normal_(0.0, 1.0).mul_(std)
    else:
        W.copy_(torch.randn(W.shape, generator=generator, dtype=torch.float32, device=generator.device) * std)


def draw_linear(linear: nn.Linear | nn.Conv2d, multiple: float, std: float | None, g: torch.Generator | None) -> None:
    """Entries of standard deviation `multiple` times `std`, by default 1/√(inputs); biases of zero.

    Args:
        linear: a linear map, or one of patches.
        multiple: of the standard deviation.
        std: the same for all maps, or None.
        g: as in `draw`.
    """
    inputs = linear.weight[0].numel()
    draw(linear.weight, multiple * (inputs**-0.5 if std is None else std), g)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
