"""Heads chosen by name, `LAYER.HEAD` or `STACK.LAYER.HEAD`: spectra at long contexts are dear, one may be enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from fullrank.errors import ModelError, ShapeError

__all__ = ["ChosenHeads", "Heads"]


class Heads(Protocol):
    """Some heads of every attention call."""

    def of(self, stack: str, layer: int, heads: int) -> tuple[int, ...]:
        """Those of one call, rising; none where nothing of this layer is wanted."""


@dataclass(frozen=True)
class ChosenHeads:
    """Which heads of which layers.

    Attributes:
        named: as they were written, with stack (None: any), layer (from 1) and head (from 0).
    """

    named: tuple[tuple[str, str | None, int, int], ...]

    @classmethod
    def read(cls, names: Iterable[str]) -> Self:
        """The heads that these names say.

        Args:
            names: such as `3.5` (layer 3, head 5) or `decoder.3.5`.

        Returns:
            The choice.

        Raises:
            ShapeError: for no name at all, or one that is none.
        """
        named = []
        if not isinstance(names, Iterable):
            raise ShapeError(f"heads={names!r} names no heads; pass a list of names such as '3.5' or 'decoder.3.5'.")
        for name in [names] if isinstance(names, str) else names:
            *stack, layer, head = ["", "", *str(name).strip().rsplit(".", 2)][-3:]
            if not (layer.isdecimal() and head.isdecimal() and int(layer) > 0):
                raise ShapeError(
                    f"heads={name!r} is no head; write LAYER.HEAD or STACK.LAYER.HEAD, layers from 1 and heads from 0, "
                    "such as 3.5 or decoder.3.5."
                )
            named.append((str(name).strip(), stack[0] or None, int(layer), int(head)))
        if not named:
            raise ShapeError("heads= is empty; leave it out for all heads, or pass spectrum=False for none.")
        return cls(tuple(named))

    def require(self, layers: Mapping[str, int]) -> None:
        """Refuse a name whose layer no stack has.

        Args:
            layers: how many each stack has.

        Raises:
            ModelError: naming what there is.
        """
        for name, stack, layer, _ in self.named:
            if not any(layer <= count for one, count in layers.items() if stack in (None, one)):
                have = ", ".join(f"{one} (layers 1 to {count})" for one, count in layers.items())
                raise ModelError(f"heads={name!r} is in no stack of this model; it has {have}.")

    def of(self, stack: str, layer: int, heads: int) -> tuple[int, ...]:
        """The chosen heads of one attention call, rising.

        Args:
            stack: whose call it is.
            layer: of the block.
            heads: how many the call has.

        Returns:
            Their numbers, none where nothing of this layer was chosen.

        Raises:
            ModelError: for a head that the call does not have.
        """
        found = set()
        for name, wanted, at, head in self.named:
            if wanted in (None, stack) and at == layer:
                if head >= heads:
                    raise ModelError(
                        f"heads={name!r} names head {head}; layer {layer} of {stack} has {heads} (0 to {heads - 1})."
                    )
                found.add(head)
        return tuple(sorted(found))
