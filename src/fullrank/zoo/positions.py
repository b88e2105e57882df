"""Where a token stands: sines added to the stream, or rotations of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotated", "sinusoids"]

_BASE = 10_000.0


def _angles(tokens: int, pairs: int, device: torch.device) -> Tensor:
    """Angle t · 10000^(−i/pairs) of pair i at token t, (tokens, pairs), in float64."""
    t = torch.arange(tokens, device=device, dtype=torch.float64)
    i = torch.arange(pairs, device=device, dtype=torch.float64)
    return t[:, None] * _BASE ** (-i / pairs)


def sinusoids(tokens: int, width: int, *, like: Tensor) -> Tensor:
    """Sines in the first half of the features, cosines in the second; (tokens, width), mean square 1/2.

    Args:
        tokens: in a sequence.
        width: even.
        like: of the dtype and device wanted.

    Returns:
        What is added to every sequence.
    """
    angles = _angles(tokens, width // 2, like.device)
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)


def rotated(x: Tensor) -> Tensor:
    """Features i and i + d/2 turned by t · 10000^(−2i/d) at token t: q·k then depends on the distance of tokens.

    Args:
        x: (…, tokens, d), d even.

    Returns:
        Of the same shape and norms.
    """
    tokens, d = x.shape[-2:]
    angles = _angles(tokens, d // 2, x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
