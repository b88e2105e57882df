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
        rms: of what comes out of random tokens of rms 1, without what comes out of zeros.
    """

    kind: Kind
    gain: float
    degree: int | None
    rms: float


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
    z = z + _SHIFT * torch.randn(*like[:-1], 1, generator=draw)
    exact = max(1e-3, 16 * torch.finfo(dtype).eps)

    def run(x: Tensor) -> Tensor:
        return function(x.to(dtype)).float()

    zero, one, three = run(torch.zeros(like)), run(z), run(3 * z)
    mine = z if features is None else z[..., features]
    size = float((one - zero).square().mean().sqrt()) / float(mine.square().mean().sqrt())
    degree = _degree(one - zero, three - zero, one, three, exact)
    if one.numel() != z.numel() or degree is None:
        return TokenMap("other", math.nan, degree, size)
    one, zero, flat = (x.reshape(-1, like[-1]) for x in (one, zero, z))
    if degree == 1:
        gain, off = _channels(one - zero, flat)
        if off <= exact:
            return TokenMap("scale", gain, 1, size)
        return TokenMap("other", math.nan, 1, size)
    centred = flat - flat.mean(-1, keepdim=True)
    kinds: tuple[tuple[Kind, Tensor], ...] = (("layernorm", centred), ("rmsnorm", flat))
    for kind, x in kinds:
        gain, off = _channels(one, x / x.square().mean(-1, keepdim=True).sqrt(), biased=True)
        if off <= max(_NORM, exact):
            return TokenMap(kind, _but_for_epsilon(gain, 1e-3), 0, size)
    return TokenMap("other", math.nan, 0, size)


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
