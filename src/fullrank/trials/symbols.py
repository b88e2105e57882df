"""Symbols of a language as a model reads and says them: token ids or vectors, and which output says which."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fullrank.errors import TrialError
from fullrank.spec.subject import first_option
from fullrank.trials.main_input import Feed

__all__ = ["SYMBOLS", "answers", "longest", "vectors", "words"]

SYMBOLS = 16


def words(model: nn.Module, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Symbols as token ids, none of which the configuration gives a special meaning."""
    size = _vocabulary(model)
    config = getattr(model, "config", None)
    special = {
        first_option(config, f"{name}_token_id") for name in ("pad", "bos", "eos", "sep", "cls", "decoder_start")
    }
    free = [word for word in range(size) if word not in special]
    if len(free) < 2:
        raise TrialError(f"the model reads {size} words, too few for the built-in task; pass data.")
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(free)[order[:SYMBOLS]]

    def dress(x: Tensor) -> Tensor:
        return ids[x]

    return dress, len(ids)


def vectors(feed: Feed, tokens: int, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Symbols as fixed Gaussian vectors, to which sines of the position are added, of half their energy."""
    width = feed.shape[2]
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn((SYMBOLS, width), generator=draw)
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(tokens)[:, None] * frequency
    places = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]

    def dress(x: Tensor) -> Tensor:
        return table[x] + places

    return dress, SYMBOLS


def answers(dress: Callable[[Tensor], Tensor], symbols: int, width: int, feed: Feed, *, head: bool) -> Tensor | None:
    """Which output says which symbol; None where the head has none for it, so that a readout is put behind it."""
    if feed.kind == "tokens":
        ids = dress(torch.arange(symbols))
        if int(ids.max()) < width and head:
            return ids
    return torch.arange(symbols) if width >= symbols and head else None


def _vocabulary(model: nn.Module) -> int:
    ask = getattr(model, "get_input_embeddings", None)
    weight = getattr(ask(), "weight", None) if callable(ask) else None
    if isinstance(weight, Tensor):
        return int(weight.shape[0])
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not sizes:
        raise TrialError("no table of words was found in the model, so that its vocabulary is unknown; pass data.")
    return sizes[0]  # the words' own is made first; a position table comes after it


def longest(model: nn.Module, shown: int) -> int:
    """Tokens that surely fit: as many as were shown, or as the configuration allows."""
    limit = first_option(getattr(model, "config", None), "max_position_embeddings", "n_positions")
    return max(shown, limit - 4) if isinstance(limit, int) else shown
