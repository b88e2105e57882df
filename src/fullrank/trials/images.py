"""Images to tell apart: handwritten digits where scikit-learn is there, else drawn shapes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CLASSES", "Part", "images", "is_of_digits"]

Part = Literal["training", "choosing", "held out"]

CLASSES = 10
_PARTS: tuple[Part, ...] = ("held out", "training", "training", "training", "choosing", *(("training",) * 3))


def is_of_digits() -> bool:
    """Whether scikit-learn is there, with its 1,797 digits of 8 × 8 pixels."""
    return importlib.util.find_spec("sklearn") is not None


def images(seed: int, count: int, *, shape: tuple[int, int, int], classes: int, part: Part) -> tuple[Tensor, Tensor]:
    """Images and their classes, each class once in every run of as many images as there are classes.

    Of every eight digits in the order of the set six are for training, one is for choosing and one is held out, so that
    no image is in two parts. They are drawn without replacement: none comes again before its class is used up (18 to 26
    of each in the smaller parts), and then in another order. Fewer classes than ten are their remainders. With the same
    seed fewer digits are the first of more.

    Args:
        seed: of the choice.
        count: how many.
        shape: channels, height, width; images are enlarged to it and channels repeated.
        classes: how many are told apart, at most ten.
        part: which to draw from.

    Returns:
        (count, *shape), of mean 0 and standard deviation 1 over the whole set, and (count,) classes.
    """
    told = int.from_bytes(hashlib.blake2b(f"{seed} {part}".encode(), digest_size=6).digest())
    order = torch.Generator().manual_seed(told)
    y = torch.cat([torch.randperm(classes, generator=order) for _ in range(-(-count // classes))])[:count]
    small = _digits(y, classes, part, told) if is_of_digits() else _shapes(y, told)
    channels, height, width = shape
    big = functional.interpolate(small[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return big.expand(count, channels, height, width).contiguous(), y


@functools.cache
def _loaded() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return torch.as_tensor(X, dtype=torch.float32).reshape(-1, 8, 8) / 16, torch.as_tensor(y)


def _digits(y: Tensor, classes: int, part: Part, seed: int) -> Tensor:
    X, of = _loaded()
    here = torch.tensor([part == _PARTS[at % 8] for at in range(len(of))])
    chosen = torch.empty_like(y)
    for c in range(classes):
        pool, places = (here & (of % classes == c)).nonzero()[:, 0], (y == c).nonzero()[:, 0]
        draw = torch.Generator().manual_seed(seed + 1 + c)
        rounds = [pool[torch.randperm(len(pool), generator=draw)] for _ in range(-(-len(places) // len(pool)))]
        chosen[places] = torch.cat([pool[:0], *rounds])[: len(places)]
    return (X[chosen] - X.mean()) / X.std()


def _shapes(y: Tensor, seed: int) -> Tensor:
    """Gratings of 8 × 8 in as many directions as there are classes, at a random phase and under noise."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.arange(8, dtype=torch.float32)
    angle = torch.pi * y / CLASSES
    phase = 2 * torch.pi * torch.rand(y.shape, generator=draw)
    along = angle.cos()[:, None, None] * at[:, None] + angle.sin()[:, None, None] * at
    noise = torch.randn((len(y), 8, 8), generator=draw)
    return ((1.5 * along + phase[:, None, None]).sin() + 0.3 * noise) / math.sqrt(0.5 + 0.3**2)
