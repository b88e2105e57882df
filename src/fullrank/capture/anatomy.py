"""What the survey of a model found: its stacks of blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from fullrank.capture.layout import PLAIN, Layout
from fullrank.capture.visits import Visit
from fullrank.capture.weights import Weight

__all__ = ["Anatomy", "Stack", "stack_names"]


@dataclass(frozen=True)
class Stack:
    """Blocks that hand one residual stream on to each other.

    Attributes:
        name: `decoder`, `encoder`, `vision`, with `.1`, … where there are several.
        paths: module names of the blocks in call order; a shared block appears once per call.
        calls: for each block call the parts of its attention calls, such as ("self", "cross").
        heads: attention heads of the first attending block; None without attention.
        width: of the stream, after the first block.
        causal: whether its self-attention never looks ahead.
        layout: which axes of the stream hold sequences, tokens and features.
        at: the place or name under which blocks are given their stream, where it is not the first tensor that could be.
        end: where each block is a layer of weights with what follows it, and ends where the next begins: the module
            whose call ends the last block, or whose return does, where the blocks are inside it; None where each
            block is one module call.
        callers: for each block call and each of its attention calls, the name of the module that called.
        weights: for each block call its weights with their roles.
        embed: the embedding that leads to the first block.
        unembed: the product after the last block with one output for each entry of the embedding.
    """

    name: str
    paths: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]
    heads: int | None
    width: int
    causal: bool
    layout: Layout = PLAIN
    callers: tuple[tuple[str, ...], ...] = ()
    at: int | str | None = None
    end: str | None = None
    weights: tuple[tuple[Weight, ...], ...] = ()
    embed: Weight | None = None
    unembed: Weight | None = None

    @property
    def over(self) -> Literal["tokens", "samples"]:
        """What the stream holds for each item of the batch: tokens, or nothing but one vector or image.

        Of `samples` only those of the batch can be compared with each other.
        """
        return "samples" if self.layout.axes == "samples" else "tokens"

    @property
    def ends_inside(self) -> bool:
        """Whether the last block ends with the return of a module around it, and not with the call of the next."""
        return self.end is not None and (self.end == "" or self.paths[-1].startswith(f"{self.end}."))


@dataclass(frozen=True)
class Anatomy:
    """All stacks of a model, and what could not be told.

    Attributes:
        stacks: in order of their first call.
        notes: sentences for the reader of a report.
        apart: names of modules whose attention is made of several maps of which none is its own; they are not read.
    """

    stacks: tuple[Stack, ...]
    notes: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


_VISION = re.compile(r"(^|[._])(vision|visual|image)", re.IGNORECASE)


def stack_names(firsts: Sequence[Visit], roles: Sequence[Set[str]]) -> list[str]:
    """A name for each stack.

    `vision` where images go in (the nearest module around the blocks that is called with pixels or token ids decides,
    then the path); else `decoder` where self-attention is causal or there is cross-attention; else `encoder`;
    `backbone` where there is no attention at all.

    Args:
        firsts: the first block call of each stack.
        roles: of each stack's attention, any of `self`, `causal`, `cross` and `unread`; empty without attention.

    Returns:
        Names, told apart by `.1`, `.2`, … where needed.
    """
    names: list[str] = []
    for first, role in zip(firsts, roles, strict=True):
        kind = next((visit.input_kind for visit in first.ancestors() if visit.input_kind), None)
        if not role:
            name = "backbone"
        elif "cross" not in role and (kind == "vision" or (kind is None and _VISION.search(first.path))):
            name = "vision"
        else:
            name = "decoder" if role & {"causal", "cross"} else "encoder"
        taken = sum(other.split(".")[0] == name for other in names)
        names.append(f"{name}.{taken}" if taken else name)
    return names
