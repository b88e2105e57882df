"""What the cases of all families share: sizes, batches, and the register that they enter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from seen import Case

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
IMAGE = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = TEXT | ENDS
KV = PLAIN | {"num_key_value_heads": 2}
KVH = KV | {"head_dim": 8}

FAMILIES: dict[str, Callable[[], Case]] = {}
"""By name; the docstring of each says in a few words what is particular about its attention."""


def family(make: Callable[[], Case]) -> Callable[[], Case]:
    """Enter a case under its function's name."""
    assert make.__name__ not in FAMILIES
    assert make.__doc__
    FAMILIES[make.__name__] = make
    return make


REFUSED: dict[str, str] = {}
"""Families in which no blocks are found, and what the error says of them."""


def refused(sentence: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Enter a case that the survey answers with an error."""

    def enter(make: Callable[[], Case]) -> Callable[[], Case]:
        REFUSED[make.__name__] = sentence
        return family(make)

    return enter


def ids(sequences: int = 3, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text(model, blocks: str, projection: str, *, name: str = "decoder", cache: bool = True, **more) -> Case:
    batch = {"input_ids": ids()} | ({"use_cache": False} if cache else {})
    causal = frozenset({name}) if name == "decoder" else frozenset()
    paths = {name: [f"{blocks}.0", f"{blocks}.1"]}
    return Case(model, batch, paths, {name: 4}, {(name, "self"): projection}, causal, **more)


PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
}


def pair(model, blocks: str, own: str, cross: str, batch: dict, *, prefix: str = "", **more) -> Case:
    return Case(
        model,
        batch | {"use_cache": False},
        {name: [f"{prefix}{name}.{blocks}.{i}" for i in range(2)] for name in ("encoder", "decoder")},
        {"encoder": 4, "decoder": 4},
        {("encoder", "self"): own, ("decoder", "self"): own, ("decoder", "cross"): cross},
        frozenset({"decoder"}),
        **more,
    )
