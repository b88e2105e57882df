"""Several edits of one attention call: each `after` sees the call as all of them made it, whatever the kernel."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import permutations

import pytest
import torch
from kinds import build, center, seen, uniform
from torch.nn import functional

from fullrank import examine
from fullrank.edit import rewrite_attention
from fullrank.errors import EditError

FUSED = ["bert", "llama_padded", "t5", "torch_encoder", "plain"]
MADE = ["llama_eager", "torch_with_weights", "plain_softmax"]


def _scores(call):
    if call.query is None:
        s = call.logits
    else:
        K = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        s = torch.einsum("bhtd,bhsd->bhts", call.query, K)
        s = s * (call.query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.bias is not None:
        s = s + call.bias
    if call.mask is not None and call.mask.dtype != torch.bool:
        s = s + call.mask
    visible = call.visible()
    return s if visible is None else s.masked_fill(~visible, float("-inf"))


def _values(call, heads):
    return call.value.repeat_interleave(heads // call.value.shape[1], 1)


def _by_definition(call):
    """exp over its sum, times the values; by a map or by what replaces the kernel, where an edit put one in."""
    if call.attend is not None:
        return call.attend(call)
    s = _scores(call)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ _values(call, s.shape[1])


def _by_hand(edits):
    """One edit that does what several do: all that come before, the definition, all that come after, backwards."""

    def after(call, output):
        own = call.bias is not None
        call = call.change(weights=None)
        for before, _ in edits:
            call = before(call) if before else call
        made = _by_definition(call)
        if call.logits is not None:  # what an edit hid is seen in the scores alone
            call = call.change(logits=_scores(call), mask=None, bias=None)
        elif call.bias is not None and not own:
            call = call.change(mask=call.additive(), bias=None, causal=False)
        for _, then in reversed(edits):
            made = then(call, made) if then else made
        return made

    return None, after


def _shifted(call):
    place = torch.arange(call.keys, dtype=call.value.dtype)[:, None]
    return call.change(value=1.5 * call.value + torch.sin(place))


def _hidden(call):
    """Key 1 is not seen, but by itself and where only it is."""
    hidden = torch.zeros(call.queries, call.keys, dtype=call.value.dtype)
    hidden[2:, 1] = float("-inf")
    return call.change(bias=hidden[None, None] if call.bias is None else call.bias + hidden)


def _sharpened(call):
    if call.query is None:
        return call.change(logits=torch.where(call.visible(), 2 * call.logits, call.logits))
    return call.change(query=2 * call.query)


def _added(call, output):
    return 0.5 * output + uniform(call) @ _values(call, output.shape[1])


def _sigmoids(call):
    """Attention without a softmax."""
    s = _scores(call)
    return (s.sigmoid() / call.keys) @ _values(call, s.shape[1])


EDITS = {
    "value": (_shifted, None),
    "mask": (_hidden, None),
    "center": (None, center),
    "both": (_sharpened, _added),
    "attend": (lambda call: call.change(attend=_sigmoids), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED + MADE)
def test_several_edits_in_every_order_are_what_they_are_by_hand(name):
    kind, anatomy = build(name), seen(name)
    names = list(EDITS)[: None if name in FUSED else 4]
    pairs, triples = permutations(names, 2), permutations(names[1:], 3)
    with torch.no_grad():
        base = kind()
        for order in (*pairs, *triples):
            edits = [EDITS[one] for one in order]
            with rewrite_attention(kind.model, anatomy, after=_by_hand(edits)[1]):
                expected = kind()
            with ExitStack() as stack:
                for before, after in edits:
                    stack.enter_context(rewrite_attention(kind.model, anatomy, before=before, after=after))
                found = kind()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, o=order: f"{o}: {text}")
            assert not torch.allclose(found, base, atol=1e-3), order
        assert torch.equal(kind(), base)


@pytest.mark.parametrize("name", FUSED + MADE)
@pytest.mark.parametrize("first", [True, False])
def test_a_constant_added_to_the_values_is_no_matter_to_a_centred_map_in_either_order(name, first):
    kind, anatomy = build(name), seen(name)
    pair = [{"after": center}, {"before": lambda call: call.change(value=call.value + 3)}]
    with torch.no_grad():
        with rewrite_attention(kind.model, anatomy, after=center):
            expected = kind()
        with ExitStack() as stack:
            for edit in pair if first else pair[::-1]:
                stack.enter_context(rewrite_attention(kind.model, anatomy, **edit))
            torch.testing.assert_close(kind(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSED + MADE)
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_values_that_an_edit_widens_and_cuts_again_fit_what_acts_after_it(name, order):
    kind, anatomy = build(name), seen(name)
    width = 8

    def wide(call):
        return call.change(value=functional.pad(call.value, (0, 3)))

    edits = [
        {"before": wide, "after": lambda call, output: output[..., :width]},
        {"after": center},
        {"after": lambda call, output: 0.7 * output},
    ]
    with torch.no_grad():
        late = order.index(2) < order.index(1)  # what was made first acts last
        by_hand = (lambda c, o: 0.7 * center(c, o)) if late else (lambda c, o: center(c, 0.7 * o))
        with rewrite_attention(kind.model, anatomy, after=by_hand):
            expected = kind()
        with ExitStack() as stack:
            for number in order:
                stack.enter_context(rewrite_attention(kind.model, anatomy, **edits[number]))
            torch.testing.assert_close(kind(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FUSED)
def test_two_edits_that_replace_one_kernel_are_refused(name):
    kind, anatomy = build(name), seen(name)

    def computed(call):
        return call.change(attend=_sigmoids)

    def averages(call):
        return call.change(weights=uniform(call))

    for first, second in ((computed, computed), (computed, averages), (averages, computed)):
        with rewrite_attention(kind.model, anatomy, before=first):
            kind()
            with rewrite_attention(kind.model, anatomy, before=second), pytest.raises(EditError, match="only one can"):
                kind()


@pytest.mark.parametrize("name", FUSED + MADE)
def test_scores_changed_after_their_map_was_replaced_are_refused_and_before_it_are_not(name):
    kind, anatomy = build(name), seen(name)

    def averages(call):
        return call.change(weights=uniform(call))

    with torch.no_grad():
        with rewrite_attention(kind.model, anatomy, before=averages):
            expected = kind()
            with rewrite_attention(kind.model, anatomy, before=_sharpened), pytest.raises(EditError, match="map last"):
                kind()
        earlier = rewrite_attention(kind.model, anatomy, before=_sharpened)
        with earlier, rewrite_attention(kind.model, anatomy, before=averages):
            assert torch.equal(kind(), expected)


@pytest.mark.parametrize("name", FUSED + MADE)
def test_attention_that_an_edit_computes_without_a_softmax_is_still_found(name):
    kind = build(name)

    def computed(call):
        if call.query is None:
            return call.change(weights=call.logits.sigmoid() / call.keys)
        return call.change(attend=_sigmoids)

    anatomy = kind.anatomy()
    with rewrite_attention(kind.model, anatomy, before=computed), torch.no_grad():
        again = kind.anatomy()
        assert [one.calls for one in again.stacks] == [one.calls for one in anatomy.stacks]
        assert [one.callers for one in again.stacks] == [one.callers for one in anatomy.stacks]
        assert [one.heads for one in again.stacks] == [one.heads for one in anatomy.stacks]
        found: list[int] = []
        with rewrite_attention(kind.model, again, after=lambda call, output: found.append(1) or output):
            kind()
        assert len(found) == sum(len(parts) for one in anatomy.stacks for parts in one.calls)
        rows = examine(kind.model, kind.batch, spectrum=False).rows
    assert not rows.where(metric="entropy").rows


@pytest.mark.parametrize("name", MADE)
def test_causality_that_an_edit_adds_is_in_the_scores_of_a_model_that_softmaxes_by_itself(name):
    kind, anatomy = build(name), seen(name)

    def check(call, output):
        lower = torch.ones(call.queries, call.keys).tril()
        assert ((call.weights == 0) | (lower == 1)).all()
        return output

    def causal(call):
        return call.change(causal=True)

    with torch.no_grad(), rewrite_attention(kind.model, anatomy, before=causal, after=check):
        kind()
