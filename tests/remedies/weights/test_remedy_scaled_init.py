"""Scaled initialisation: which weights are shrunk, by how much, and what that does to a deep stack."""

import re

import kinds
import pytest
import torch
import transformers as hf
from kinds import ids
from matrices import matrices

import fullrank
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.parametrize(("by", "factor"), [("gpt2", 6**-0.5), ("sqrt-depth", 3**-0.5), ("depth", 1 / 3)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "torch_encoder", "plain"])
def test_the_last_weights_of_each_branch_are_shrunk_and_nothing_else(name, by, factor):
    kind = kinds.build(name)
    (stack,) = kind.lists
    last = {f"{kind.lists[stack]}.{i}.{path[stack]}.weight" for i in range(3) for path in (kind.attention, kind.mlp)}
    before = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    with fullrank.repair(kind.model, "scaled-init", by=by, batch=kind.batch):
        for n, p in kind.model.named_parameters():
            expected = before[n] * factor if n in last else before[n]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)


def test_depth_is_that_of_each_stack_and_cross_attention_is_a_branch_too():
    kind = kinds.build("t5")
    before = matrices("t5", kind.model)
    with fullrank.repair(kind.model, "scaled-init", batch=kind.batch):
        now = matrices("t5", kind.model)
    for (stack, layer, role), W in before.items():
        factor = {"encoder": 6, "decoder": 9}[stack] ** -0.5 if role in ("o", "down", "cross.o") else 1.0
        torch.testing.assert_close(now[stack, layer, role], factor * W, rtol=1e-14, atol=0)


def test_a_block_that_is_called_three_times_is_shrunk_once():
    kind = kinds.build("albert")
    group = kind.model.encoder.albert_layer_groups[0].albert_layers[0]
    before = group.attention.dense.weight.detach().clone(), group.ffn_output.weight.detach().clone()
    with fullrank.repair(kind.model, "scaled-init", batch=kind.batch):
        for W, linear in zip(before, (group.attention.dense, group.ffn_output), strict=True):
            torch.testing.assert_close(linear.weight.detach(), W / 6**0.5, rtol=1e-14, atol=0)


def test_every_expert_is_shrunk_once_and_the_router_is_not():
    config = hf.MixtralConfig(
        **kinds.TEXT | {"num_hidden_layers": 2}, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.MixtralModel(config).eval()  # its experts have no kernel in float64
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fullrank.repair(model, "scaled-init", batch={"input_ids": ids(), "use_cache": False}):
        for n, p in model.named_parameters():
            factor = 0.5 if n.endswith(("o_proj.weight", "down_proj")) else 1.0
            torch.testing.assert_close(p.detach(), factor * before[n], rtol=1e-6, atol=0)
    assert sum(n.endswith("down_proj") for n in before) == 2  # all experts of a layer in one parameter


def started(kind, config):
    """A fresh model by its class's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval(), {"input_ids": ids(), "use_cache": False}


@pytest.mark.parametrize("by", ["gpt2", "depth"])
def test_where_a_model_has_shrunk_its_last_weights_by_itself_a_note_says_that_it_is_done_twice(by):
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=32)
    model, batch = started(hf.GPT2Model, config)
    std = float(model.h[0].mlp.c_proj.weight.detach().std())
    assert std == pytest.approx(0.02 / 12**0.5, rel=0.05)
    with fullrank.repair(model, "scaled-init", by=by, batch=batch) as handle:
        (note,) = handle.notes
        assert "about what by=gpt2 makes them" in note
        said = [float(number) for number in re.findall(r"0\.\d+", note)]
        assert said == pytest.approx([12**-0.5] * 2, rel=0.05)
        factor = 12**-0.5 if by == "gpt2" else 1 / 6
        assert float(model.h[0].mlp.c_proj.weight.detach().std()) == pytest.approx(std * factor, rel=1e-5)


def test_where_it_has_not_there_is_no_such_note():
    config = hf.LlamaConfig(**kinds.TEXT | {"num_hidden_layers": 6}, num_key_value_heads=2)
    model, batch = started(hf.LlamaModel, config)
    with fullrank.repair(model, "scaled-init", batch=batch) as handle:
        assert handle.notes == ()


def deep(seed, **options):
    """24 layers of width 128 as on the card, every weight of variance 1 over its inputs, without positions."""
    config = TransformerConfig(
        depth=24, width=128, heads=4, positions="none", biases=False, vocabulary=128, context=32, **options
    )
    return Transformer(config, seed=seed).double().eval()


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(1, 32, 128, generator=generator).double()
    return {"inputs_embeds": X, "labels": torch.randint(128, (1, 32), generator=generator)}


def last_state(model, batch):
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    (X,) = seen
    unit = torch.nn.functional.normalize(X, dim=-1)
    cosine = (unit.sum(0).square().sum() - len(X)) / (len(X) * (len(X) - 1))
    return [float(X.square().mean()), float((X - X.mean(0)).norm() / X.norm()), float(cosine)]


def test_a_deep_pre_norm_stack_keeps_its_tokens_apart_as_measured():
    found = []
    for seed in range(2):
        model, batch = deep(seed), inputs(100 + seed)
        collapsed = last_state(model, batch)
        assert collapsed[1] < 0.5
        assert collapsed[2] > 0.7
        with fullrank.repair(model, "scaled-init", batch=batch):
            found.append(last_state(model, batch))
    assert_golden("rs-gpt2-init", torch.tensor(found).mean(0))


def gradients(model, batch):
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if ".inner." in name and p.ndim == 2}


def test_it_is_the_function_of_scaled_branches_and_its_last_weights_have_larger_gradients():
    batch, c = inputs(1), 48**-0.5
    one, other = deep(0), deep(0, residual_scale=c)
    with fullrank.repair(one, "scaled-init", batch=batch):
        with torch.no_grad():
            torch.testing.assert_close(one(**batch).logits, other(**batch).logits, rtol=0, atol=1e-10)
        mine, theirs = gradients(one, batch), gradients(other, batch)
    assert len(mine) == 24 * 6
    for name, gradient in mine.items():
        factor = 1 / c if name.endswith(("output.weight", "down.weight")) else 1.0
        torch.testing.assert_close(gradient, factor * theirs[name], rtol=1e-7, atol=1e-12)


def scheme(model, batch):
    """[Gini of RMS gradients, mean RMS of q and k over that of v and o, first over last layer's gradient]."""
    rows = fullrank.examine(model, batch, gradients=True, spectrum=False).rows

    def values(metric, end="", layer=None):
        found = [r for r in rows if r.metric == metric and r.part.endswith(end) and layer in (None, r.layer)]
        return [row.value for row in found if row.scope == "all"]

    (gini,) = values("gradient_heterogeneity")
    qk, vo = (
        sum(sum(values("gradient_norm", f"{n}.weight")) for n in pair)
        for pair in (("query", "key"), ("value", "output"))
    )
    (first,) = values("gradient_gain", "out", 1)
    return [gini, qk / vo, first]


@pytest.mark.slow
def test_golden_gradients_tell_it_from_scaled_branches(seed=0):
    model, batch = deep(seed), inputs(100 + seed)
    with fullrank.repair(model, "scaled-init", batch=batch):
        assert_golden("rs-gpt2-init-gradients", scheme(model, batch))
    assert_golden("rs-branch-sqrt2L", scheme(deep(seed, residual_scale=48**-0.5), batch))
