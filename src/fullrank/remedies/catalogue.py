"""Every remedy there is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fullrank.errors import RemedyError
from fullrank.remedies import attn_scale, scaled_init
from fullrank.remedies.remedy import Remedy
from fullrank.spec.grammar import close_matches

__all__ = ["CATALOGUE", "remedy_of"]

_ROOMS = (
    attn_scale,
    scaled_init,
)

CATALOGUE: Final[Mapping[str, Remedy]] = MappingProxyType(
    {one.name: one for room in _ROOMS for one in vars(room).values() if isinstance(one, Remedy)}
)
"""By name: of attention, of weights, of the residual stream and its norms, of the loss, of tokens, of state spaces."""


def remedy_of(name: str) -> Remedy:
    """The remedy of that name.

    Returns:
        It.

    Raises:
        RemedyError: where there is none; similar names are suggested.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    hint = close_matches(name, CATALOGUE) or "; `fullrank remedies` lists them"
    raise RemedyError(f"{name!r} is no remedy{hint}.")
