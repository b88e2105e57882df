"""What an edit may ask of a call, what it may not, and what is made of it."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from kinds import build, seen, uniform
from plain import sharp
from torch import nn
from torch.testing import assert_close

from fullrank.capture import survey
from fullrank.capture.dispatch import LOCK
from fullrank.edit import Call, Place, edits_in, replace_heads, rewrite_attention, skip_block
from fullrank.edit.at_block import with_state
from fullrank.edit.dispatch import Redirect, lease_for
from fullrank.errors import EditError

PLACE = Place("decoder", 1, "self", "h.0")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("plain_softmax", {"scale": 2.0}, r"before set scale, which attention in h.0.attn \(softmax\) does not show"),
        ("llama_eager", {"scale": 2.0}, "before set scale, which .* does not show; change logits"),
        ("plain_softmax", {"window": 2}, "before set window, which cannot be changed in h.0.attn; change the mask"),
        ("plain", {"window": 2}, "before set window"),
        ("llama", {"window": 2}, "before set window"),
    ],
)
def test_a_change_that_no_kernel_would_hear_of_is_refused(name, change, sentence):
    kind = build(name)
    with torch.no_grad():
        base = kind()
        edit = rewrite_attention(kind.model, seen(name), before=lambda call: call.change(**change))
        with edit, pytest.raises(EditError, match=sentence):
            kind()
        assert not edits_in(kind.model)
        assert torch.equal(kind(), base)


@pytest.mark.parametrize("field", ["logits", "mask"])
def test_a_row_of_which_all_is_masked_sees_nothing(field):
    scores = torch.tensor([[0.0, -1e9, 1.0], [-1e9, -1e9, -1e9]])[None, None]
    rows = {"logits": scores} if field == "logits" else {"query": torch.zeros(1, 1, 2, 4), "mask": scores}
    call = Call(PLACE, "softmax", torch.zeros(1, 1, 3, 4), **rows)
    assert call.visible()[0, 0].tolist() == [[True, False, True], [False, False, False]]


# ---------------------------------------------------------------- products


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out, self.far = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)))

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)

    def merge(self, y):
        return y.transpose(1, 2).flatten(2)


class WithTable(Heads):
    """The same map looks something up in a table that all sequences and heads share: fewer axes under the ellipsis."""

    def looked_up(self, x):
        q, k, v = self.split(x)
        p = (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.35).softmax(-1)
        return p, v, self.far(self.merge(torch.einsum("...qk,...kd->...qd", p, self.table)))

    def forward(self, x):
        p, v, far = self.looked_up(x)
        return x + far + self.out(self.merge(torch.einsum("... q k, ... k d -> ... q d", p, v)))


class AddedProduct(Heads):
    """The product with the values and something added to it in one call."""

    def forward(self, x):
        q, k, v = (y.flatten(0, 1) for y in self.split(x))
        p = (q @ k.mT * 0.35).softmax(-1)
        y = torch.baddbmm(self.table[None].expand(v.shape), p, v, beta=0.5, alpha=2.0)
        return x + self.out(self.merge(y.unflatten(0, (-1, 4))))


def states():
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


def test_a_product_with_fewer_axes_under_its_ellipsis_is_left_alone():
    model, x = sharp(nn.Sequential(WithTable(), WithTable())), states()
    anatomy = survey(model, lambda: model(x))
    with torch.no_grad():
        with replace_heads(model, anatomy, 0.0, layer=2):
            edited = model(x)
        state = model[0](x)
        assert_close(edited, state + model[1].looked_up(state)[2] + model[1].out.bias)


def test_a_product_with_something_added_is_no_kernel_that_can_be_edited():
    model, x = sharp(nn.Sequential(AddedProduct(), AddedProduct())), states()
    anatomy = survey(model, lambda: model(x))
    with torch.no_grad():
        base = model(x)
        edit = rewrite_attention(model, anatomy, after=lambda call, output: 0 * output, layer=1)
        with edit, pytest.raises(EditError, match="no call of a kernel that is known was seen"):
            model(x)
        assert torch.equal(model(x), base)


# ---------------------------------------------------------------- outputs of blocks


class Nested(nn.Module):
    """Returns its stream in a tuple inside what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (x + self.linear(x), "cache"), 1.5


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nested() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            (x, cache), loss = block(x)
            assert (cache, loss) == ("cache", 1.5)
        return x


def test_a_state_that_is_nested_in_what_a_block_returns_is_replaced_there():
    model, x = sharp(Chain()), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with skip_block(model, "blocks.1"):
            skipped = model(x)
        del model.blocks[1]
        assert torch.equal(skipped, model(x))


def test_a_state_is_put_where_it_is_found():
    old, new = torch.zeros(2, 3), torch.ones(2, 3)
    for output, expected in (
        (((old, "cache"), 1), ((new, "cache"), 1)),
        ([[old, old], 1], [[new, old], 1]),
        ({"state": (old, "cache"), "loss": 1}, {"state": (new, "cache"), "loss": 1}),
        (({"state": old, "other": old},), ({"state": new, "other": old},)),
    ):
        found = with_state(output, new)
        assert type(found) is type(output)
        assert repr(found) == repr(expected)
    other = with_state({"state": old, "other": (old,)}, new, "other")
    assert repr(other) == repr({"state": old, "other": (new,)})


# ---------------------------------------------------------------- tables


class Table(dict):
    """A dispatch table, of which all is its own."""

    @property
    def _local_mapping(self):
        return self


class Dispatching(nn.Module):
    config = SimpleNamespace(_attn_implementation="own")


def test_a_dispatch_table_is_not_written_while_another_thread_writes_it(monkeypatch):
    table = Table(own=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(sys.modules[Dispatching.__module__], "ALL_ATTENTION_FUNCTIONS", table, raising=False)
    leases = []

    def meanwhile(act):
        thread = threading.Thread(target=act)
        with LOCK:
            thread.start()
            thread.join(0.2)
            found = isinstance(table["own"], Redirect)
        thread.join()
        return found, isinstance(table["own"], Redirect)

    assert meanwhile(lambda: leases.append(lease_for(Dispatching()))) == (False, True)
    assert meanwhile(leases[0].release) == (True, False)
    assert table == {"own": torch.nn.functional.scaled_dot_product_attention}


@pytest.mark.parametrize("name", ["llama", "llama_eager"])
def test_after_is_told_of_a_map_that_was_put_in_and_of_no_other(name):
    kind = build(name)
    anatomy, seen_by = kind.anatomy(), []
    look = lambda call, output: [seen_by.append(call.replaced), output][1]  # noqa: E731
    even = lambda call: call.change(weights=uniform(call).expand(3, 4, 9, 9))  # noqa: E731
    sharper = lambda call: call.change(value=2 * call.value, **_sharper(call))  # noqa: E731
    with torch.no_grad(), rewrite_attention(kind.model, anatomy, after=look, layer=2):
        kind()
        with rewrite_attention(kind.model, anatomy, before=sharper, layer=2):
            kind()
        with rewrite_attention(kind.model, anatomy, before=even, layer=2):
            kind()
        kind()
    assert seen_by == [False, False, True, False]


def _sharper(call):
    return {"query": 2 * call.query} if call.query is not None else {"logits": 2 * call.logits}
