"""Every mask with a plain predicate that says the same, for the contract tests."""

import torch

from fullrank.operators import (
    Arbitrary,
    BlockLocal,
    Causal,
    Full,
    Packed,
    Padding,
    Prefix,
    SlidingWindow,
)

SQUARE = ("packed", "packed-interleaved", "packed&causal")


def mask_cases(batch, heads, queries, keys, seed=0):
    """name → (mask, visible as (batch, heads, queries, keys) bool)."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.arange(batch)[:, None, None, None]
    t = torch.arange(queries)[:, None]
    s = torch.arange(keys)
    left = torch.arange(keys) >= (torch.arange(batch)[:, None] * 3 + 2) % max(1, keys)
    ragged = torch.rand(batch, keys, generator=generator) < 0.7
    per_head = torch.rand(batch, heads, keys, generator=generator) < 0.7
    anything = torch.rand(batch, heads, queries, keys, generator=generator) < 0.5
    shared = torch.rand(queries, keys, generator=generator) < 0.1
    prefix = torch.arange(batch) * 4 + 1
    document = torch.div(torch.arange(keys) + torch.arange(batch)[:, None] * 2, 5, rounding_mode="floor")
    mixed = torch.randint(0, 3, (batch, keys), generator=generator)
    causal, window = s <= t, (s <= t) & (s > t - 4)
    cases = {
        "full": (Full(), torch.ones(queries, keys, dtype=torch.bool)),
        "causal": (Causal(), causal),
        "causal-cache": (Causal(keys - queries), s <= t + keys - queries),
        "window": (SlidingWindow(4), window),
        "window-cache": (SlidingWindow(4, offset=2), (s <= t + 2) & (s > t + 2 - 4)),
        "window-two-sided": (SlidingWindow(3, causal=False), (s - t).abs() < 3),
        "block-local": (BlockLocal(5), t // 5 == s // 5),
        "prefix": (Prefix(3), (s < 3) | causal),
        "prefix-per-sequence": (Prefix(prefix), (s < prefix[:, None, None, None]) | causal),
        "padding": (Padding(ragged), ragged[:, None, None]),
        "padding-per-head": (Padding(per_head), per_head[:, :, None]),
        "arbitrary": (Arbitrary(anything), anything),
        "arbitrary-sparse": (Arbitrary(shared), shared),
        "causal&padding": (Causal() & Padding(left), causal & left[:, None, None]),
        "window&padding": (SlidingWindow(4) & Padding(ragged), window & ragged[:, None, None]),
        "causal&block-local": (Causal() & BlockLocal(5), causal & (t // 5 == s // 5)),
        "all&": (
            Arbitrary(anything) & Causal() & Padding(left) & Full(),
            anything & causal & left[:, None, None],
        ),
        "nothing": (Padding(torch.zeros(batch, keys, dtype=torch.bool)), torch.zeros(keys, dtype=torch.bool)),
    }
    if queries == keys:
        same = document[:, None, :, None] == document[:, None, None, :]
        cases["packed"] = (Packed(document), same)
        cases["packed&causal"] = (Packed(document) & Causal(), same & causal)
        interleaved = mixed[:, None, :, None] == mixed[:, None, None, :]
        cases["packed-interleaved"] = (Packed(mixed), interleaved)
    del b
    return {
        name: (mask, visible.expand(batch, heads, queries, keys).contiguous())
        for name, (mask, visible) in cases.items()
    }


MASKS = tuple(mask_cases(1, 1, 2, 2))
