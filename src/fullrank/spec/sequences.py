"""From documents to sequences of token ids of a given context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch

from fullrank.errors import BatchError, ContextError
from fullrank.spec.documents import Documents
from fullrank.spec.quiet import quiet
from fullrank.spec.subject import Subject

__all__ = ["Frame", "chosen_context", "closing_tokens", "cut", "random_tokens"]

DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """How many of a sequence's tokens they are."""
        return len(self.before) + len(self.after)


def chosen_context(subject: Subject, context: int | None) -> int:
    """The context asked for, or min(512, what the model takes).

    Args:
        subject: the model.
        context: tokens per sequence; None for the default.

    Returns:
        Tokens per sequence, special tokens included.

    Raises:
        ContextError: for a context below 2, or beyond a learned table of positions.
    """
    limit = subject.positions.limit
    if context is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if context < 2:
        raise ContextError(f"context={context} leaves one token or none; nothing to compare: use context>=2.")
    if limit is not None and context > limit and subject.positions.learned:
        raise ContextError(
            f"context={context}, but this {subject.kind_of_model} has {limit} learned positions; "
            f"use context<={limit} or a rotary architecture."
        )
    return context


def cut(documents: Documents, subject: Subject, *, context: int, count: int) -> tuple[list[list[int]], str]:
    """Sequences of at most `context` tokens, and how they were cut, in words.

    Args:
        documents: the texts.
        subject: the model with its tokenizer.
        context: tokens per sequence, special tokens included.
        count: how many sequences at most.

    Returns:
        Token ids of each sequence, and a description.

    Raises:
        BatchError: where a document gives fewer than two tokens, or the tokenizer's ids are not the model's.
        ContextError: where the special tokens leave no room.
    """
    with quiet():
        frame = _frame(subject.tokenizer, documents.texts[0])
        tokens = [_ids(subject.tokenizer, text) for text in documents.texts]
    room = context - frame.width
    if room < 1:
        raise ContextError(
            f"context={context} has no room for text: this tokenizer adds {frame.width} special tokens; "
            f"use context>={frame.width + 1}."
        )
    pieces, told = _pieces(documents, tokens, room=room, count=count)
    told += _first(subject.tokenizer, frame)
    sequences = [[*frame.before, *piece, *frame.after] for piece in pieces]
    names = documents.names if documents.cut != "stretches" else documents.names * len(sequences)
    for name, sequence in zip(names, sequences, strict=False):
        if len(sequence) < 2:
            found = "one token" if sequence else "no token"
            raise BatchError(f"{name} gives {found}; at least two are needed to compare.")
    largest = max(map(max, sequences))
    if subject.vocabulary is not None and largest >= subject.vocabulary:
        raise BatchError(
            f"the tokenizer of {subject.name} gives the token id {largest}, but the model knows {subject.vocabulary}; "
            "the two do not belong together."
        )
    return sequences, told


def _first(tokenizer: Any, frame: Frame) -> str:
    """`; [CLS] first`, where the tokenizer puts something before a text: such a token often becomes a sink."""
    names = tokenizer.convert_ids_to_tokens(list(frame.before)) if frame.before else []
    return f"; {' '.join(map(str, names))} first" if names else ""


def _pieces(
    documents: Documents, tokens: Sequence[Sequence[int]], *, room: int, count: int
) -> tuple[list[list[int]], str]:
    if documents.cut == "continued":
        shortest = min(map(len, tokens))
        pieces = [_continued(tokens, start=start, length=room) for start in range(len(tokens))]
        if room <= shortest:
            return pieces, "the beginning of each"
        total = sum(map(len, tokens))
        told = "each continued with the following ones, so that sequences share text"
        return pieces, told + (f", repeated after {total} tokens" if room > total else "")
    if documents.cut == "stretches":
        whole = tokens[0]
        pieces = [list(whole[start : start + room]) for start in range(0, len(whole), room)][:count]
        if len(pieces) > 1 and len(pieces[-1]) < room / 2:
            pieces.pop()  # a short rest would weigh as much as a full sequence in every mean
        return pieces, "consecutive stretches" if len(pieces) > 1 else "in one sequence"
    return [list(document[:room]) for document in tokens], "the beginning of each"


def _continued(tokens: Sequence[Sequence[int]], *, start: int, length: int) -> list[int]:
    order = [*tokens[start:], *tokens[:start]]
    return list(islice(chain.from_iterable(cycle(order)), length)) if any(order) else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _frame(tokenizer: Any, text: str) -> Frame:
    """What the tokenizer adds around a text, read off by encoding the text with and without."""
    sample = text[:200]
    bare = _ids(tokenizer, sample)
    full = list(tokenizer.encode(sample, verbose=False))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return Frame(tuple(full[:start]), tuple(full[start + len(bare) :]))
    return Frame()


def closing_tokens(subject: Subject, text: str) -> int:
    """How many special tokens the subject's tokenizer puts after a text."""
    with quiet():
        return len(_frame(subject.tokenizer, text).after)


def random_tokens(subject: Subject, *, context: int, count: int, seed: int) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary, special tokens left out.

    Args:
        subject: the model.
        context: tokens per sequence.
        count: how many sequences.
        seed: of the draw.

    Returns:
        Token ids of each sequence.

    Raises:
        BatchError: where the size of the vocabulary is unknown, or nothing of it is left.
    """
    if subject.vocabulary is None:
        raise BatchError(f"{subject.name} does not say how many token ids it knows; pass a batch from Python.")
    config = subject.config
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        special |= set(value) if isinstance(value, (list, tuple)) else {value}
    keep = torch.tensor([number for number in range(subject.vocabulary) if number not in special])
    if keep.numel() == 0:
        raise BatchError(f"{subject.name} knows {subject.vocabulary} token ids, all of them special.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(keep.numel(), (count, context), generator=generator)
    rows: list[list[int]] = keep[drawn].tolist()
    return rows
