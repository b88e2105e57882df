"""What a model is fed: the argument of a batch that carries the content, and other content in the same place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.errors import TrialError

__all__ = ["Feed", "feed_of"]

Kind = Literal["tokens", "pixels", "vectors"]
_SECOND = "decoder_input_ids"
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Feed:
    """How a model is called.

    Attributes:
        kind: token ids, images or vectors.
        key: the argument's name; None for the first positional one, or the only.
        shape: of what the batch had there.
        seconds: whether a decoder is fed token ids beside it.
        alone: whether a tensor is the whole batch.
        tokens_first: whether its first axis holds tokens and its second sequences.
        options: other arguments that are no tensors and are passed as they were.
    """

    kind: Kind
    key: str | None
    shape: tuple[int, ...]
    seconds: bool = False
    alone: bool = False
    tokens_first: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def call(self, content: Tensor, second: Tensor | None = None) -> Any:
        """A batch with this content, all of it real; masks and labels of the batch are left out."""
        content = content.transpose(0, 1) if self.tokens_first else content
        if self.key is None:
            return content if self.alone else (content,)
        named = {self.key: content, **dict(self.options)}
        return named if second is None else {**named, _SECOND: second}


def feed_of(model: nn.Module, batch: Any) -> Feed:
    """How a model is fed, seen from a batch that it takes.

    Args:
        model: its name for its main input counts where it has one.
        batch: a mapping, a tuple or list, or a tensor.

    Returns:
        The feed.

    Raises:
        TrialError: where nothing in the batch is token ids, images or vectors.
    """
    if isinstance(batch, Tensor):
        return _turned(model, Feed(_kind(batch), None, tuple(batch.shape), alone=True))
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return _turned(model, Feed(_kind(batch[0]), None, tuple(batch[0].shape)))
    if isinstance(batch, Mapping):
        names = [getattr(model, "main_input_name", None), "input_ids", "pixel_values", "inputs_embeds", *batch]
        for name in names:
            value = batch.get(name) if name is not None and name not in _MASKS else None
            if isinstance(value, Tensor) and value.ndim >= 2 and value.dtype != torch.bool:
                options = {k: v for k, v in batch.items() if isinstance(v, bool | int | float | str)}
                if isinstance(batch.get(_SECOND), Tensor) and _kind(value) != "tokens":
                    raise TrialError("there is no built-in task for a decoder beside images or vectors; pass data.")
                of, shape, more = _kind(value), tuple(value.shape), tuple(options.items())
                return _turned(model, Feed(of, str(name), shape, _SECOND in batch, options=more))
    raise TrialError("the batch holds no token ids, images or vectors, so that there is no built-in task; pass data.")


def _turned(model: nn.Module, feed: Feed) -> Feed:
    """The feed with sequences first in its shape; torch's own modules say where they are not."""
    said = {module.batch_first for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    if said != {False} or feed.kind == "pixels":
        return feed
    tokens, sequences, *rest = feed.shape
    return replace(feed, shape=(sequences, tokens, *rest), tokens_first=True)


def _kind(value: Tensor) -> Kind:
    if value.ndim == 2 and not value.is_floating_point():
        return "tokens"
    if value.ndim == 4 and value.is_floating_point():
        return "pixels"
    if value.ndim == 3 and value.is_floating_point():
        return "vectors"
    raise TrialError(
        f"the batch's content has the shape {tuple(value.shape)} of {value.dtype}; there is a built-in task for token "
        "ids (sequences, tokens), images (images, channels, height, width) and vectors (sequences, tokens, width)."
    )
