"""Images to tell apart: handwritten digits where scikit-learn is there, else drawn shapes."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CLASSES", "images", "is_of_digits"]

CLASSES = 10


def is_of_digits() -> bool:
    """Whether scikit-learn is there, with its 1,797 digits of 8 × 8 pixels."""
    return importlib.util.find_spec("sklearn") is not None


def images(seed: int, count: int, *, shape: tuple[int, int, int], classes: int, train: bool) -> tuple[Tensor, Tensor]:
    """Images and their classes, all classes equally often drawn.

    Of digits three quarters are for training and a quarter is held out; fewer classes than ten are their remainders.

    Args:
        seed: of the choice.
        count: how many.
        shape: channels, height, width; images are enlarged to it and channels repeated.
        classes: how many are told apart, at most ten.
        train: whether to draw from those for training.

    Returns:
        (count, *shape), of mean 0 and standard deviation 1, and (count,) classes.
    """
    draw = torch.Generator().manual_seed(2 * seed + train)
    y = torch.randint(classes, (count,), generator=draw)
    small = _digits(y, classes, train, draw) if is_of_digits() else _shapes(y, draw)
    small = (small - small.mean()) / small.std()
    channels, height, width = shape
    big = functional.interpolate(small[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return big.expand(count, channels, height, width).contiguous(), y


@functools.cache
def _loaded() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return torch.as_tensor(X, dtype=torch.float32).reshape(-1, 8, 8) / 16, torch.as_tensor(y)


def _digits(y: Tensor, classes: int, train: bool, draw: torch.Generator) -> Tensor:
    X, of = _loaded()
    here = (torch.arange(len(of)) % 4 != 0) == train
    pools = [(here & (of % classes == c)).nonzero()[:, 0] for c in range(classes)]
    u = torch.rand(y.shape, generator=draw)
    return X[torch.stack([pools[int(c)][int(v * len(pools[int(c)]))] for c, v in zip(y, u, strict=True)])]


def _shapes(y: Tensor, draw: torch.Generator) -> Tensor:
    """Gratings of 8 × 8 in as many directions as there are classes, at a random phase and under noise."""
    at = torch.arange(8, dtype=torch.float32)
    angle = torch.pi * y / CLASSES
    phase = 2 * torch.pi * torch.rand(y.shape, generator=draw)
    along = angle.cos()[:, None, None] * at[:, None] + angle.sin()[:, None, None] * at
    noise = torch.randn((len(y), 8, 8), generator=draw)
    return (1.5 * along + phase[:, None, None]).sin() + 0.3 * noise
