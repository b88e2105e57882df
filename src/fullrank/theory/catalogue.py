"""Every theory that predicts metrics of the table from an architecture."""

from __future__ import annotations

from collections.abc import Iterable

from fullrank.architecture import Architecture
from fullrank.errors import TheoryError
from fullrank.theory.batchnorm_course import BATCHNORM
from fullrank.theory.cowsik import COWSIK
from fullrank.theory.deepscalelm_course import DEEPSCALELM
from fullrank.theory.giorlandino_goldt import giorlandino_goldt
from fullrank.theory.mind_the_gap import MIND_THE_GAP
from fullrank.theory.noci import NOCI
from fullrank.theory.theory import Theory
from fullrank.theory.wu_masks_layernorm_course import WU_MASKS_LAYERNORM

__all__ = ["THEORIES", "chosen", "ranked"]

THEORIES: tuple[Theory, ...] = (
    giorlandino_goldt,
    NOCI,
    WU_MASKS_LAYERNORM,
    COWSIK,
    BATCHNORM,
    DEEPSCALELM,
    MIND_THE_GAP,
)
"""In the order in which those that fit equally well are listed."""


def chosen(keys: Iterable[str] | None) -> tuple[Theory, ...]:
    """Theories by their keys.

    Args:
        keys: of papers, or one of them as a string; None for all.

    Returns:
        In the catalogue's order.

    Raises:
        TheoryError: for a key that is none.
    """
    if keys is None:
        return THEORIES
    wanted = [keys] if isinstance(keys, str) else list(keys)
    known = {one.key for one in THEORIES}
    unknown = [key for key in wanted if key not in known]
    if unknown or not wanted:
        found = repr(unknown[0]) if unknown else "nothing"
        raise TheoryError(f"theories= names {found}; there are {', '.join(one.key for one in THEORIES)}.")
    return tuple(one for one in THEORIES if one.key in wanted)


def ranked(theories: Iterable[Theory], architecture: Architecture) -> list[tuple[float, Theory]]:
    """Those whose assumptions hold, best first, with how well they hold; nothing measured enters."""
    fits = [(one.fit(architecture), one) for one in theories]
    return sorted(((fit, one) for fit, one in fits if fit > 0), key=lambda pair: -pair[0])
