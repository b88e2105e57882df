"""What a function does to tokens, told from what it makes of random ones: scales them, normalises them, or else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["NONLINEARITIES", "TokenMap", "nonlinearity", "token_map"]

Kind = Literal["scale", "layernorm", "rmsnorm", "batchnorm", "other"]

_NORM = 0.02  # how far a norm may be from the formula: its ε, and gelu from its approximations
_SHIFT = 0.5
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
"""What an MLP can have between its weights, by the name in an `Architecture`."""


@dataclass(frozen=True)
class TokenMap:
    """A function of tokens.

    Attributes:
        kind: `scale`: every channel times a number; `layernorm`: tokens minus their mean over features are brought to
            rms 1; `rmsnorm`: tokens as they are; `batchnorm`, which is told from the call alone; `other`.
        gain: root mean square over channels of the number, or of the norm's gain, with the sign of their mean.
        degree: of homogeneity, where three times the tokens make 1 (0) or 3 times (1) as much; None for neither.
        rms: of what comes out of random tokens of rms 1, without what comes out of zeros, where it is not 0.
        peak: the largest that comes out, of the largest that goes in: the factor where entries only change places.
    """

    kind: Kind
    gain: float
    degree: int | None
    rms: float
    peak: float


def token_map(
    function: Callable[[Tensor], Tensor], like: torch.Size, *, dtype: torch.dtype, features: Tensor | None = None
) -> TokenMap:
    """Tell what a function of a tensor of tokens does to each token.

    Args:
        function: from (…, tokens, width) to a tensor of as many entries, or of others: then of the kind only `other` is
            told.
        like: the shape of what it takes.
        dtype: of what it takes.
        features: of the tokens, which are looked at for `rms`; by default all.

    Returns:
        What it does.
    """
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(like, generator=draw)
    z = (z + _SHIFT * torch.randn(*like[:-1], 1, generator=draw)).to(dtype).float()
    exact = max(1e-3, 16 * torch.finfo(dtype).eps)

    def run(x: Tensor) -> Tensor:
        return function(x.to(dtype)).float()

    zero, one, three = run(torch.zeros(like)), run(z), run(3 * z)
    mine, moved = z if features is None else z[..., features], one - zero
    moved = moved[moved != 0]  # zeros are padding, of blocks or of heads
    degree = _degree(one - zero, three - zero, one, three, exact)
    size = float(moved.square().mean().sqrt()) if moved.numel() else 0.0
    peak = float(moved.abs().max() / mine.abs().max()) if moved.numel() else 0.0
    if degree != 0:
        size /= float(mine.square().mean().sqrt())
    if one.numel() != z.numel() or degree is None:
        return TokenMap("other", math.nan, degree, size, peak)
    for order in _orders(one.shape, like):
        found = _kind(
            one.reshape(-1, like[-1])[order], zero.reshape(-1, like[-1])[order], z.flatten(0, -2), degree, exact
        )
        if found is not None:
            return TokenMap(found[0], found[1], degree, size, peak)
    return TokenMap("other", math.nan, degree, size, peak)


def _orders(made: torch.Size, like: torch.Size) -> list[Tensor]:
    """Orders in which the tokens may have come out: as they went in, or with sequences and tokens exchanged."""
    orders = [torch.arange(torch.Size(like[:-1]).numel())]
    for shape in (made, like):
        if len(shape) == 3 and shape[0] * shape[1] == len(orders[0]):
            orders += [orders[0].view(a, b).T.flatten() for a, b in ((shape[0], shape[1]), (shape[1], shape[0]))]
    return orders


def _kind(one: Tensor, zero: Tensor, z: Tensor, degree: int, exact: float) -> tuple[Kind, float] | None:
    """What made `one` of the tokens z, and its gain."""
    if degree == 1:
        gain, off = _channels(one - zero, z)
        return ("scale", gain) if off <= exact else None
    kinds: tuple[tuple[Kind, Tensor], ...] = (("layernorm", z - z.mean(-1, keepdim=True)), ("rmsnorm", z))
    for kind, x in kinds:
        gain, off = _channels(one, x / x.square().mean(-1, keepdim=True).sqrt(), biased=True)
        if off <= max(_NORM, exact):
            return kind, _but_for_epsilon(gain, 1e-3)
    return None


def _degree(one: Tensor, three: Tensor, whole: Tensor, thrice: Tensor, exact: float) -> int | None:
    """Of one - f(0) and three - f(0) whether the second is three times the first; of the whole whether it is the same.

    Returns:
        1, 0, or None for neither.
    """
    if _off(three, 3 * one) <= exact:
        return 1
    return 0 if _off(thrice, whole) <= _NORM else None


def _off(found: Tensor, wanted: Tensor) -> float:
    size = float(wanted.square().mean().sqrt())
    off = float((found - wanted).square().mean().sqrt())
    return off / size if size else (0.0 if off == 0 else math.inf)


def _channels(y: Tensor, x: Tensor, *, biased: bool = False) -> tuple[float, float]:
    """Least squares of y by x (and a constant), channel by channel.

    Returns:
        Root mean square of the factors with the sign of their mean, and the share of y that is left over.
    """
    y_0, x_0 = (y.mean(0), x.mean(0)) if biased else (torch.zeros(()), torch.zeros(()))
    factor = ((y - y_0) * (x - x_0)).sum(0) / (x - x_0).square().sum(0)
    rms = float(factor.double().square().mean().sqrt())
    return math.copysign(rms, float(factor.mean())), _off(factor * (x - x_0) + y_0, y)


def nonlinearity(function: Callable[[Tensor], Tensor], like: torch.Size, *, dtype: torch.dtype) -> tuple[str, float]:
    """Tell which function, times a number, is applied to every entry.

    Args:
        function: of a tensor, to one of as many entries in the same order.
        like: the shape of what it takes.
        dtype: of what it takes.

    Returns:
        A name of `NONLINEARITIES` and the number; an empty name for any other function.
    """
    z = 2 * torch.randn(like, generator=torch.Generator().manual_seed(0))
    y = function(z.to(dtype)).float()
    if y.numel() != z.numel():
        return "", math.nan
    best, least, factor = "", _NORM, math.nan
    for name, candidate in NONLINEARITIES.items():
        x = candidate(z).reshape(y.shape)
        times = float((x * y).sum() / x.square().sum())
        if times and (off := _off(times * x, y)) < least:
            best, least, factor = name, off, times
    return best, _but_for_epsilon(factor, _NORM)


def _but_for_epsilon(factor: float, within: float) -> float:
    return 1.0 if abs(factor - 1) <= within else factor
