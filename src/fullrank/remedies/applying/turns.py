"""In which order repairs of a model were made, and what they have added."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fullrank.capture.wrappers import bare

__all__ = ["IN_FORCE", "Turn", "added_before"]


@dataclass(frozen=True, eq=False)
class Turn:
    """One repair in the order of those of a model. It holds neither, so that both are freed when nobody needs them.

    Attributes:
        names: of its remedies.
        repair: its handle, as long as somebody keeps it.
        added: names of parameters that it has added.
    """

    names: str
    repair: weakref.ref[Any]
    added: frozenset[str]


IN_FORCE: weakref.WeakKeyDictionary[nn.Module, list[Turn]] = weakref.WeakKeyDictionary()
"""Repairs by model, in the order applied; a copy of a model has none that could be undone."""


def added_before(model: nn.Module, further: Iterable[str] = ()) -> list[nn.Parameter]:
    """Parameters that repairs in force have added.

    Args:
        model: the model.
        further: names of others.

    Returns:
        In the order of the model.
    """
    names = {name for turn in IN_FORCE.get(bare(model), ()) for name in turn.added} | set(further)
    return [p for name, p in bare(model).named_parameters() if name in names]
