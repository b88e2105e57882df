"""LayerNorm Scaling: what blocks read, and what becomes of the stream's growth."""

import kinds
import pytest
import torch
from mixed import two_stacks
from schemes import deep, gradients, repaired_states, states, variance

import fullrank
from fullrank.errors import RemedyError

READS = {
    "gpt2": ("ln_1", "ln_2"),
    "llama_padded": ("input_layernorm", "post_attention_layernorm"),
    "vit": ("layernorm_before", "layernorm_after"),
    "plain": ("ln_1", "ln_2"),
    "falcon": ("input_layernorm",),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_as_norms_with_smaller_gains(name, power):
    kind = kinds.build(name)
    (stack,) = kind.lists
    with torch.no_grad():
        plain = kind()
        with fullrank.repair(kind.model, "layernorm-scaling", power=power, batch=kind.batch) as repair:
            found = kind()
            assert repair.parameters == 0
        for layer, block in enumerate(kind.blocks(stack), 1):
            for norm in (block.get_submodule(path) for path in READS[name]):
                for p in norm.parameters():
                    p.mul_(layer**-power)
        torch.testing.assert_close(found, kind(), rtol=0, atol=1e-5 if name.startswith("llama") else 1e-10)
        assert not torch.allclose(found, plain, atol=1e-3)


def test_every_stack_counts_its_own_blocks():
    kind = kinds.build("t5")
    with fullrank.repair(kind.model, "layernorm-scaling", batch=kind.batch) as repair:
        assert len(repair.applied[0].edit.where) == 2 * 2 + 2 * 3


def test_models_that_do_not_read_through_norms_of_their_own_are_refused():
    for options, words in (
        ({"placement": "post"}, "has no norm before a branch"),
        ({"placement": "none", "norm": "none"}, "has no norm before a branch"),
        ({"depth": 1}, "has one block"),
        (
            {"placement": "peri"},
            r"attention of encoder layer 1 of this Transformer normalises what it adds too \(peri\)",
        ),
    ):
        model, X = deep(**({"depth": 2, "width": 32} | options))
        with pytest.raises(RemedyError, match=words):
            fullrank.repair(model, "layernorm-scaling", batch={"inputs_embeds": X})


def test_of_a_published_family_with_norms_on_both_sides():
    kind = kinds.build("gemma2")
    with pytest.raises(RemedyError, match=r"normalises what it adds too \(peri\).*would not make that smaller"):
        fullrank.repair(kind.model, "layernorm-scaling", batch=kind.batch)


def test_a_stack_that_reads_through_no_norm_is_named():
    case = two_stacks()
    with fullrank.repair(case.model, "layernorm-scaling", batch=case.batch) as repair:
        assert repair.notes == (
            "layernorm-scaling: the branches of decoder read through no norm, and decoder is left as it is.",
        )
        assert len(repair.applied[0].edit.where) == 2


def test_the_stream_grows_as_the_logarithm_of_depth_and_no_longer_linearly():
    model, X = deep()
    plain, scaled = states(model, X), repaired_states(model, X, "layernorm-scaling")
    assert variance(plain[24]) > 10
    assert variance(scaled[24]) < 5
    late = [variance(scaled[n]) - variance(scaled[n // 2]) for n in (12, 24)]
    assert late[1] < 1.5 * late[0]
    grown = [variance(plain[n]) - variance(plain[n // 2]) for n in (12, 24)]
    assert grown[1] > 1.5 * grown[0]
    with fullrank.repair(model, "layernorm-scaling", batch={"inputs_embeds": X}):
        first = gradients(model, X)[2]
    assert abs(first - 1) < 0.6 < gradients(model, X)[2] - 1
