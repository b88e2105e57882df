"""Which contexts and which heads were asked for, refused in one sentence where they cannot be had."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fullrank.errors import BatchError, ContextError
from fullrank.measure.chosen import ChosenHeads
from fullrank.spec import Subject
from fullrank.verbs.ranks import Ranks

__all__ = ["Held", "checked_contexts", "checked_probes", "chosen_heads", "held_against", "longest_context"]

DTYPES = ("float16", "bfloat16", "float8_e4m3", "float8_e5m2")
_FEWEST = 8


def longest_context(contexts: Sequence[int], subject: Subject) -> int | None:
    """How many tokens the default inputs need to have.

    Args:
        contexts: from `checked_contexts`.
        subject: what reads them.

    Returns:
        The longest; None without contexts.

    Raises:
        BatchError: where the subject is fed by default with something else than text.
    """
    if contexts and subject.batch is None and subject.modality not in ("text", "multimodal"):
        raise BatchError(f"contexts= was given, but {subject.name} reads {subject.modality} input, not text.")
    return max(contexts, default=None)


def chosen_heads(heads: Sequence[str] | None, *, spectrum: bool) -> ChosenHeads | None:
    """The heads whose spectra are taken.

    Args:
        heads: names, or None for all.
        spectrum: whether spectra are taken at all.

    Returns:
        The choice; None for all.

    Raises:
        BatchError: where heads are chosen for spectra that are left out.
    """
    if heads is None:
        return None
    if not spectrum:
        raise BatchError("heads= chooses heads for singular values, which spectrum=False (--no-spectrum) leaves out.")
    return ChosenHeads.read(heads)


def checked_probes(probes: int) -> int:
    """The number of random projections, refused below one.

    Args:
        probes: how many were asked for.

    Returns:
        The same.

    Raises:
        BatchError: for none.
    """
    if probes < 1:
        raise BatchError(f"probes={probes}; at least one random projection is needed.")
    return probes


@dataclass(frozen=True)
class Held:
    """What a model is held against beside its references.

    Attributes:
        dtypes: whose range it must fit.
        epsilon: of the optimiser.
    """

    dtypes: tuple[str, ...] = ()
    epsilon: float | None = None


def held_against(dtypes: Sequence[str], epsilon: float | None) -> Held:
    """The target dtypes and the optimiser's epsilon, refused where they are none.

    Args:
        dtypes: names.
        epsilon: a small positive number; None for none.

    Returns:
        Both.

    Raises:
        BatchError: for a dtype whose range is not asked about, or an epsilon that is not positive.
    """
    for name in (dtypes,) if isinstance(dtypes, str) else dtypes:
        if name not in DTYPES:
            raise BatchError(f"target_dtypes: {name!r} is not one of {', '.join(DTYPES)}.")
    if epsilon is not None and not epsilon > 0:
        raise BatchError(f"epsilon={epsilon!r}; an optimiser's epsilon is a small positive number, such as 1e-8.")
    return Held((dtypes,) if isinstance(dtypes, str) else tuple(dtypes), epsilon)


def checked_contexts(contexts: Sequence[int] | None, ranks: Ranks | None = None) -> tuple[int, ...]:
    """The contexts, refused where they cannot be compared.

    Args:
        contexts: tokens, rising; None for none.
        ranks: the processes; by default this one alone.

    Returns:
        The same as a tuple; an empty one for None.

    Raises:
        ContextError: unless they are two or more whole numbers from 8 on, each larger than the one before.
        BatchError: where several processes share the batch.
    """
    if contexts is None:
        return ()
    if ranks is not None and ranks.several:
        raise BatchError("contexts= goes with one process: this model is distributed.")
    rule = "pass two or more whole numbers from 8 on, each larger than the one before, such as 256,1024,4096"
    try:
        found = tuple(map(operator.index, contexts))
    except TypeError:  # no sequence, or not of whole numbers
        raise ContextError(f"contexts={contexts!r} are no lengths; {rule}.") from None
    if len(found) < 2 or found[0] < _FEWEST or any(a >= b for a, b in pairwise(found)):
        raise ContextError(f"contexts={list(found)} cannot be compared; {rule}.")
    return found
