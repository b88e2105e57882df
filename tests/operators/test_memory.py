"""No pass holds more than a few blocks, however long the context and however many the heads."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fullrank.operators import (
    Arbitrary,
    AttentionOperator,
    Causal,
    Full,
    Packed,
    Padding,
    SlidingWindow,
)

MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Largest total size of the storages that operations made and that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given and storage._cdata not in self.alive:
                    continue  # a view of an input
                users, _ = self.alive.setdefault(storage._cdata, (set(), storage.nbytes()))
                users.add(id(tensor))
                weakref.finalize(tensor, self.forget, storage._cdata, id(tensor))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    def forget(self, storage, user):
        users, _ = self.alive.get(storage, (set(), 0))
        users.discard(user)
        if not users:
            self.alive.pop(storage, None)


def peak(work):
    with LiveBytes() as live:
        work()
    return live.peak / MIB


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_meter_sees_temporaries_and_forgets_them():
    x = torch.zeros(MIB)
    assert peak(lambda: (x + 1).sum()) == pytest.approx(4, abs=0.1)
    assert peak(lambda: [(x + 1).sum() for _ in range(5)]) == pytest.approx(4, abs=0.1)
    assert peak(lambda: (x + 1) + (x + 2)) == pytest.approx(12, abs=0.1)


MASKS = {
    "full": lambda keys: Full(),
    "causal": lambda keys: Causal(keys - 96),
    "padding": lambda keys: Padding(torch.arange(keys)[None] % 7 > 0),
    "causal&padding": lambda keys: Causal(keys - 96) & Padding(torch.arange(keys)[None] % 7 > 0),
    "window": lambda keys: SlidingWindow(512, offset=keys - 96),
    "arbitrary": lambda keys: Arbitrary(torch.rand(96, keys, generator=torch.Generator().manual_seed(0)) < 0.5),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_summary_of_32768_keys_holds_32_mebibytes(name, dtype):
    """The first 96 queries against all keys: every block of a longer map is like these."""
    keys = 32768
    operator = AttentionOperator(
        draw(1, 8, 96, 64, dtype=dtype), draw(1, 2, keys, 64, dtype=dtype), mask=MASKS[name](keys)
    )
    assert peak(operator.summary) <= 32


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(8, 12, 128), (64, 16, 64), (2, 4, 1024)])
def test_many_short_maps_hold_no_more_than_one_long_one(batch, heads, tokens):
    query = draw(batch, heads, tokens, 32)
    operator = AttentionOperator(query, query, mask=Causal())
    rows = 7 * 8 * query.shape[:3].numel() / MIB
    assert peak(operator.summary) <= 32 + 2 * rows


@pytest.mark.parametrize("name", ["full", "causal", "padding", "window"])
def test_products_with_32768_keys_hold_little_beside_their_result(name):
    keys = 32768
    operator = AttentionOperator(draw(1, 2, 96, 64), draw(1, 2, keys, 64), mask=MASKS[name](keys))
    V, u = draw(1, 2, keys, 32), draw(1, 2, 96, 32)
    assert peak(lambda: operator.matmat(V)) <= 48
    assert peak(lambda: operator.rmatmat(u)) <= 48
    U = operator.uniform()
    assert peak(lambda: U.matmat(V)) <= 48
    assert peak(lambda: U.rmatmat(u)) <= 48


def test_a_biased_map_holds_no_more():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]

    def alibi(queries, keys):
        t, s = torch.arange(queries.start, queries.stop), torch.arange(keys.start, keys.stop)
        return -slopes * (t[:, None] - s).abs()

    operator = AttentionOperator(draw(1, 4, 96, 64), draw(1, 4, 16384, 64), bias=alibi, mask=Causal(16384 - 96))
    assert peak(operator.summary) <= 48


def test_packed_documents_skip_what_no_query_sees():
    """64 documents of 64 tokens: blocks on the diagonal are all that is computed."""
    document = torch.arange(4096)[None] // 64
    query = draw(1, 1, 4096, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        AttentionOperator(query, query, mask=Packed(document)).summary()
    flops = sum(event.flops for event in profile.events() if event.name == "aten::bmm")
    assert flops <= 0.3 * 2 * 2 * 4096 * 4096 * 16
