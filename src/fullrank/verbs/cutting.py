"""The same batch, its sequences ended early: what a run at a shorter context is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fullrank.verbs.batches import Call

__all__ = ["Length", "cut", "length_of"]


class Length(NamedTuple):
    """How many sequences and places a call has, and how many real tokens each sequence has.

    Attributes:
        real: (sequences, places) bool, on the CPU; the places of padding are included.
        decoder: the same of what a decoder reads beside its encoder; None where nothing is.
        tokens_first: whether floating inputs are (tokens, sequences, width).
    """

    real: Tensor
    decoder: Tensor | None
    tokens_first: bool

    @property
    def sequences(self) -> int:
        """In the batch."""
        return self.real.shape[0]

    @property
    def places(self) -> int:
        """Per sequence, padding included."""
        return self.real.shape[1]

    @property
    def counts(self) -> Tensor:
        """(sequences,) real tokens."""
        return self.real.sum(-1)

    @property
    def decoder_places(self) -> int:
        """Per sequence, padding included, what a decoder reads beside its encoder."""
        return 0 if self.decoder is None else self.decoder.shape[1]


def length_of(call: Call, *, tokens_first: bool = False) -> Length | None:
    """The length of a call's sequences.

    Args:
        call: what the model is called with.
        tokens_first: whether floating inputs are (tokens, sequences, width).

    Returns:
        The length; None where the call holds nothing that is known to be a sequence (pixels, sound).
    """
    given = call.real if isinstance(call.real, dict) else {"encoder": call.real}
    known, theirs = given.get("encoder"), given.get("decoder")
    ids = call.kwargs.get("decoder_input_ids")
    decoder = theirs if theirs is not None else ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
    main = known if known is not None else call.token_ids
    shape = None if main is None else tuple(main.shape)
    if shape is None:
        shape = next((tuple(t.shape[:2]) for t in call.tensors if t.is_floating_point() and t.ndim == 3), None)
        if shape is not None and tokens_first:
            shape = (shape[1], shape[0])
    if shape is None:
        return None
    real = torch.ones(shape, dtype=torch.bool) if known is None else known.bool().cpu()
    if decoder is not None:
        decoder = torch.ones(decoder.shape, dtype=torch.bool) if theirs is None else theirs.bool().cpu()
    return Length(real, decoder, tokens_first)


def cut(call: Call, length: Length, context: int, *, closing: int = 0) -> tuple[Call, Tensor] | None:
    """The call with every sequence ended after `context` real tokens, without padding.

    Cut are all tensors that go by token: (sequences, tokens, …), (tokens, sequences, width), (tokens, tokens) and what
    ends in these two, (1, tokens), (tokens,). What a decoder reads is cut to as many tokens, or stays where it has
    fewer.

    Args:
        call: what the model is called with.
        length: `length_of(call)`.
        context: real tokens.
        closing: how many special tokens end every sequence; they end the cut ones too.

    Returns:
        The call with those sequences that have so many real tokens, and which they are; None where there are none.
    """
    long = length.counts >= context
    if length.decoder is not None and length.decoder.shape[1] >= context:
        long &= length.decoder.sum(-1) >= context
    kept = long.nonzero()[:, 0]
    if not kept.numel():
        return None
    places = _first_real(length.real[kept], context)
    ends = _last_real(length.real[kept], closing) if closing else places[:, :0]
    theirs = None
    if length.decoder is not None:
        theirs = _first_real(length.decoder[kept], min(context, int(length.decoder[kept].sum(-1).min())))
    of_decoder = length.decoder_places

    def shorter(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        read_by_decoder = name.startswith("decoder") or name == "labels"
        if theirs is not None and read_by_decoder and value.shape[1:2] == (of_decoder,):
            return _along(value, kept, theirs)
        if value is call.token_ids and closing:
            return _along(value, kept, torch.cat([places[:, : context - closing], ends], -1))
        return _shorter(value, length, kept, places)

    made = replace(
        call,
        args=tuple(shorter("", value) for value in call.args),
        kwargs={name: shorter(name, value) for name, value in call.kwargs.items()},
        real=None,
        token_ids=None if call.token_ids is None else shorter("", call.token_ids),
    )
    return made, kept


def _first_real(real: Tensor, count: int) -> Tensor:
    """(sequences, count): where the first real tokens are."""
    return torch.argsort((~real).to(torch.int8), dim=-1, stable=True)[:, :count]


def _last_real(real: Tensor, count: int) -> Tensor:
    order = torch.argsort(real.to(torch.int8), dim=-1, stable=True)  # real tokens last, in order
    return order[:, order.shape[1] - count :]


def _along(value: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    return value[kept.to(value.device)[:, None], places.to(value.device)]


def _shorter(value: Tensor, length: Length, kept: Tensor, places: Tensor) -> Tensor:
    B, T, c = length.sequences, length.places, places.shape[1]
    shape = tuple(value.shape)
    if length.tokens_first and value.is_floating_point() and value.ndim == 3 and shape[:2] == (T, B):
        return _along(value.transpose(0, 1), kept, places).transpose(0, 1)
    if shape[:2] == (B, T) and (shape != (T, T) or _by_token(value, length)):
        return _along(value, kept, places)
    if value.ndim >= 2 and shape[-2:] == (T, T):
        whole = value[kept.to(value.device)] if value.ndim > 2 and shape[0] == B else value
        return whole[..., :c, :c]
    if value.ndim == 3 and shape[1:] == (B, T):  # positions along several axes
        return torch.stack([_along(one, kept, places) for one in value])
    if shape in ((T,), (1, T)):
        return value[..., :c]
    return value[kept.to(value.device)] if shape[0] == B else value


def _by_token(value: Tensor, length: Length) -> bool:
    """Of a square tensor of as many sequences as tokens: whether it goes by token (ids, padding), or by two tokens."""
    if value.is_floating_point():
        return False
    if value.dtype != torch.bool:
        return True
    given = value.cpu()
    return torch.equal(given, length.real) or torch.equal(~given, length.real)
