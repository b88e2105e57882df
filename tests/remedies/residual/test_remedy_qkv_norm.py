"""QKV-norm against its definition on dense maps."""

import functools

import kinds
import pytest
import torch
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen
from mixed import modern, two_stacks
from remedy_patients import build
from schemes import deep

import fullrank
from fullrank.errors import RemedyError

CASES = {
    "full": functools.partial(build, "vit"),
    "grouped, rotary": functools.partial(build, "zoo_decoder"),
    **{
        mask: MASKS[mask]
        for mask in ("causal", "causal and padded", "causal and padded on the left", "causal window", "biased")
    },
}


def unit(X, eps):
    return X / (X.square().mean(-1, keepdim=True) + eps).sqrt()


def by_definition(call, eps):
    q, k, v = (unit(one, eps) for one in (call.q, call.k, call.v))
    beside = call.s - call.scale * call.q @ call.k.mT  # biases, and −inf
    return dense_softmax(beside + q @ k.mT / q.shape[-1] ** 0.5) @ v


@pytest.mark.parametrize("mask", CASES)
def test_heads_attend_with_normalised_queries_keys_and_values(mask):
    case = CASES[mask]()
    with repaired_and_seen(case, "qkv-norm", eps=1e-3) as (_, calls):
        for call in calls():
            if call.part != "self":
                continue
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], by_definition(call, 1e-3)[rows], rtol=0, atol=1e-8)


def test_the_state_itself_is_what_attention_is_given():
    case = build("gpt2")
    with torch.no_grad():
        embedded = case.model(**case.batch, output_hidden_states=True).hidden_states[0]
    with repaired_and_seen(case, "qkv-norm") as (_, calls):
        torch.testing.assert_close(calls()[0].input, embedded.double(), rtol=0, atol=1e-12)


def test_a_norm_that_the_mlp_reads_too_is_left_alone():
    kind = kinds.build("falcon")
    with pytest.raises(RemedyError, match="is read by the MLP too"):
        fullrank.repair(kind.model, "qkv-norm", batch=kind.batch)
    model, X = deep(2, width=32, placement="res-post")
    with pytest.raises(RemedyError, match="has no norm before a branch"):
        fullrank.repair(model, "qkv-norm", batch={"inputs_embeds": X})


def test_a_stack_that_reads_through_no_norm_stays_as_it_is_and_is_named():
    case = two_stacks()
    with repaired_and_seen(case, "qkv-norm") as (repair, calls):
        assert repair.notes == (
            "qkv-norm: self-attention of decoder layer 1, 2 reads through no norm and is left as it is.",
        )
        for call in calls():
            expected = by_definition(call, 1e-6) if call.stack == "vision" else call.A @ call.v
            torch.testing.assert_close(call.output, expected, rtol=0, atol=1e-8)


def test_a_first_block_that_reads_what_the_embedding_normalised_is_changed_with_the_others():
    case = modern()
    with repaired_and_seen(case, "qkv-norm") as (repair, calls):
        assert not repair.notes
        assert [call.layer for call in calls()] == [1, 2, 3]
        for call in calls():
            torch.testing.assert_close(call.output, by_definition(call, 1e-6), rtol=0, atol=1e-8)


def test_entropies_no_longer_depend_on_the_size_of_queries_and_keys():
    def entropy(size, remedy):
        model, X = deep(2, width=32, heads=2, qk_std=size)
        batch = {"inputs_embeds": X}
        with fullrank.repair(model, remedy, batch=batch):
            rows = fullrank.examine(model, batch, spectrum=False).rows.where(metric="entropy", layer=1)
        return sum(row.value for row in rows) / len(list(rows))

    other = "residual-scale?by=number&alpha=0.999"
    assert entropy(8.0, other) < 0.5 * entropy(1.0, other)
    assert entropy(8.0, "qkv-norm") == pytest.approx(entropy(1.0, "qkv-norm"), rel=1e-3)


def test_subspaces_do_not_share_a_denominator():
    """Values of one part of the state do not change when a part that W_V does not read grows."""
    model, X = deep(1, width=32, heads=1)
    attention = model.blocks[0].attention.inner
    attention.value.weight.data[:, 16:] = 0
    larger = X.clone()
    larger[..., 16:] *= 10

    def values(states):
        seen = []
        hook = attention.value.register_forward_hook(lambda m, args, output: seen.append(output))
        with torch.no_grad():
            model(inputs_embeds=states)
        hook.remove()
        return seen[0]

    assert (values(larger) / values(X)).abs().median() < 0.3
    with fullrank.repair(model, "qkv-norm", batch={"inputs_embeds": X}):
        assert torch.equal(values(larger), values(X))
