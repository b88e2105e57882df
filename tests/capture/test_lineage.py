"""Following tensors: sources, softmaxes and residual additions, where they lead and where they stop."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import PreNorm, SoftmaxAttention, sharp, states
from seen import record
from torch import nn
from torch.testing import assert_close

from fullrank.capture.marks import OUTSIDE, Marks
from fullrank.capture.residual import ResidualTrace
from fullrank.capture.softmax import SoftmaxTrace


def test_results_have_the_sources_of_all_they_were_made_of():
    marks = Marks()
    x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
    marks.add(x, 2)
    marks.add(y, 4)
    marks.follow((x, [y, z]), {}, (both := torch.cat([x, y, z]),))
    assert marks.of(both) == 6
    marks.follow((z, 0, x), {}, None)  # z[0] = x
    assert marks.of(z) == 2
    assert marks.of(torch.ones(2)) == 0


def test_marks_keep_nothing_alive_and_do_not_pass_to_a_reused_address():
    marks = Marks()
    for _ in range(100):
        marks.add(torch.ones(2), 2)
    gc.collect()
    assert not marks._bits


def test_what_a_block_is_called_with_beside_its_stream_is_outside():
    marks = Marks()
    stream, memory, ids = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, dtype=torch.long)
    marks.enter(stream, 2, (stream, memory), {"ids": ids})
    assert [marks.of(x) for x in (stream, memory, ids)] == [2, OUTSIDE, 0]


def followed(write):
    """Run a block written as a function of (trace, x) and see what is made of it."""
    x = states()
    trace = ResidualTrace(x)

    def do(name, function, *args):
        trace.overwrites(name, args)
        out = function(*args)
        trace.see(name, args, out)
        return out

    return trace, trace.finish(write(do, x, trace))


def add(do, x, y):
    return do("add", torch.add, x, y)


def attend(trace, x):
    trace.attention += 1
    return x * 0.1


def test_the_operand_of_the_last_addition_is_the_state_between():
    kept = {}

    def block(do, x, trace):
        kept["mid"] = add(do, x, attend(trace, x))
        y = do("linear", torch.mul, kept["mid"], 2.0)
        return add(do, kept["mid"], y)

    _, seen = followed(block)
    assert seen.mid.data_ptr() == kept["mid"].data_ptr()
    assert seen.read_input is None
    assert seen.read_mid is None


def test_nothing_is_told_without_attention_before_or_with_attention_after():
    def no_attention(do, x, trace):
        m = add(do, x, x * 0.1)
        return add(do, m, do("linear", torch.mul, m, 2.0))

    def mlp_first(do, x, trace):
        m = add(do, x, do("linear", torch.mul, x, 2.0))
        do("linear", torch.mul, m, 2.0)
        return add(do, m, attend(trace, m))

    def never_read(do, x, trace):
        return add(do, add(do, x, attend(trace, x)), x * 2)

    def lost(do, x, trace):
        m = add(do, x, attend(trace, x))
        return add(do, m, do("linear", torch.mul, m, 2.0)) * 1.5  # a function nobody saw

    for block in (no_attention, mlp_first, never_read, lost):
        assert followed(block)[1].mid is None


def test_a_state_that_was_overwritten_is_not_handed_on():
    def block(do, x, trace):
        m = add(do, x, attend(trace, x))
        y = do("linear", torch.mul, m, 2.0)
        out = add(do, m, y)
        m.mul_(0)
        return out

    assert followed(block)[1].mid is None


def test_an_addition_in_place_leaves_a_copy_of_what_it_overwrites():
    before = {}

    def block(do, x, trace):
        m = add(do, x, attend(trace, x))
        before["mid"] = m.clone()
        y = do("linear", torch.mul, m, 2.0)
        return do("add_", torch.Tensor.add_, m, y)

    _, seen = followed(block)
    assert torch.equal(seen.mid, before["mid"])


def test_an_additional_position_is_no_residual_addition():
    """DETR adds positions to its queries: the sum leads nowhere."""

    def block(do, x, trace):
        q = add(do, x, torch.ones_like(x))
        m = add(do, x, attend(trace, q))
        return add(do, m, do("linear", torch.mul, m, 2.0))

    assert_close(followed(block)[1].mid, states() + (states() + 1) * 0.1)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(1, 5))


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, permutation=st.permutations("bhts"), values=st.permutations("bhsd"), swapped=st.booleans())
def test_an_einsum_is_read_whatever_the_order_of_its_letters(shape, permutation, values, swapped):
    """The softmax is over the last letter, the values' contracted letter is found, lead axes keep their order."""
    b, h, t, d = shape
    sizes = dict(zip("bhtsd", (b, h, t, 7, d), strict=True))
    left = [x for x in permutation if x != "s"] + ["s"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn([sizes[x] for x in left], generator=generator)
    value = torch.randn([sizes[x] for x in values], generator=generator)
    weights = logits.softmax(-1)
    a, v = "".join(left), "".join(values)
    equation, factors = (f"{v},{a}->bhtd", (value, weights)) if swapped else (f"{a},{v}->bhtd", (weights, value))
    trace, marks = SoftmaxTrace(), Marks()
    assert trace.see("softmax", (logits, -1), {}, weights, marks, None) is None
    out = torch.einsum(equation, *factors)
    call = trace.see("einsum", (equation, *factors), {}, out, marks, None)
    lead = [x for x in left if x in "bh"]
    order = [*lead, "t", "d"]
    assert_close(call.weights @ call.value, out.permute(["bhtd".index(x) for x in order]))
    assert_close(call.logits.softmax(-1), call.weights)


def test_products_that_do_not_sum_over_keys_are_no_attention():
    trace, marks = SoftmaxTrace(), Marks()
    logits = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    trace.see("softmax", (logits, -1), {}, p, marks, None)
    q = torch.ones(2, 4, 5, 5)
    assert trace.see("matmul", (q, p), {}, q @ p, marks, None) is None  # sums over queries
    equation = "bhts,bhsd->bhtsd"
    assert trace.see("einsum", (equation, p, q), {}, torch.einsum(equation, p, q), marks, None) is None
    assert [tuple(shape) for shape in trace.take_unused()] == [(2, 4, 5, 5)]
    over_queries = logits.softmax(-2)
    trace.see("softmax", (logits, -2), {}, over_queries, marks, None)
    assert trace.see("matmul", (over_queries, q), {}, over_queries @ q, marks, None) is None


def test_as_many_sequences_as_tokens_is_said():
    model = sharp(nn.Sequential(*(PreNorm(SoftmaxAttention("module")) for _ in range(2))))
    _, recorder, _ = record(model, lambda: model(states(9, 9)))
    assert any("as many sequences as tokens" in note for note in recorder.notes)
