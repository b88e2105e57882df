"""Iterative orthogonalisation: the spectrum that each weight makes of the batch, and what that does in depth."""

import kinds
import pytest
import torch
import transformers as hf
from kinds import ids
from matrices import matrices, others

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.weights.bn_orthogonalise import flattening
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
SIZES = {"width": 16, "heads": 2, "mlp_width": 32, "vocabulary": 60, "context": 32, "positions": "none"}


def tokens(n=64):
    return {"input_ids": torch.randperm(60, generator=torch.Generator().manual_seed(0)).repeat(2)[:n].reshape(2, -1)}


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_what_each_weight_makes_of_the_batch_has_the_root_of_its_spectrum_at_the_old_size(power):
    model = Transformer(TransformerConfig(depth=3, **SIZES), seed=0).double().eval()
    seen = {}
    pairs = [
        (index, module)
        for index, block in enumerate(model.blocks)
        for module in (block.attention.inner.value, block.mlp.inner.up)
    ]
    before = [module.weight.detach().clone() for _, module in pairs]
    hooks = [
        module.register_forward_pre_hook(lambda m, args: seen.update({id(m): args[0].flatten(0, 1)}))
        for _, module in pairs
    ]
    with torch.no_grad(), fullrank.repair(model, "bn-orthogonalise", power=power, batch=tokens()):
        model(**tokens())
        for (_, module), old in zip(pairs, before, strict=True):
            H = seen[id(module)]  # what it reads with the weights of the layers before it as they are now
            s = torch.linalg.svdvals(H)
            made = torch.linalg.svdvals(H @ module.weight.mT)[: len(s)]
            assert s[-1] < 1e-6 * s[0]  # a layer norm has no mean to show
            expected = (s * s.clamp(min=1e-3 * float(s[0])) ** -power).sort(descending=True).values
            torch.testing.assert_close(made / made[0], expected / expected[0], rtol=1e-6, atol=1e-7)
            assert float(made.norm()) == pytest.approx(float((H @ old.mT).norm()), rel=1e-9)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "torch_encoder", "plain"])
def test_only_values_and_first_weights_of_the_mlp_change(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    rest = others(kind.model, before)
    with fullrank.repair(kind.model, "bn-orthogonalise", batch=kind.batch):
        for (stack, layer, role), W in matrices(name, kind.model).items():
            assert torch.equal(W, before[stack, layer, role]) == (role not in ("v", "up", "gate"))
            assert torch.isfinite(W).all()
        assert all(torch.equal(p, rest[n]) for n, p in kind.model.named_parameters() if n in rest)


def test_directions_that_the_batch_does_not_show_count_as_the_smallest():
    generator = torch.Generator().manual_seed(0)
    H, W = (torch.randn(*shape, generator=generator).double() for shape in ((5, 8), (8, 8)))
    new = flattening(W, H, 0.5, 0.1)
    _, s, Vh = torch.linalg.svd(H)
    u, _, v = torch.linalg.svd(W)
    full = torch.cat([s.clamp(min=0.1 * s[0]), (0.1 * s[0]).expand(3)])
    expected = (u @ v) @ Vh.mT @ torch.diag(full**-0.5) @ Vh
    torch.testing.assert_close(new / new.norm(), expected / expected.norm(), rtol=0, atol=1e-12)


def test_singular_values_are_exact_with_as_many_rows_as_inputs_and_of_a_part_of_the_batch_with_fewer():
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(40, 12, generator=generator).double() @ torch.diag(torch.logspace(0, -1.5, 12).double())
    s = torch.linalg.svdvals(H)
    for rows in (12, 20):
        W = torch.randn(rows, 12, generator=generator).double()
        made = torch.linalg.svdvals(H @ flattening(W, H, 0.5, 1e-3).mT)[:12]
        torch.testing.assert_close(made / made[0], (s / s[0]).sqrt(), rtol=1e-9, atol=0)
    W = torch.randn(4, 12, generator=generator).double()
    made = torch.linalg.svdvals(H @ flattening(W, H, 0.5, 1e-3).mT)
    assert float((made / made[0] - (s / s[0]).sqrt()[:4]).abs().max()) > 0.05
    # what fewer rows keep: Q S^½ for orthonormal rows Q, whose values interlace with those of S^½
    u, _, v = torch.linalg.svd(W, full_matrices=False)
    _, _, V = torch.linalg.svd(H)
    expected = torch.linalg.svdvals((u @ v) @ V.mT @ torch.diag(s.sqrt()))
    torch.testing.assert_close(made / made[0], expected / expected[0], rtol=1e-9, atol=0)


def silent(how):
    """A model of which an MLP reads or makes nothing but zeros."""
    kind = kinds.build("gpt2")
    with torch.no_grad():
        if how == "norm":
            kind.model.h[1].ln_2.weight.zero_()
            kind.model.h[1].ln_2.bias.zero_()
        else:
            kind.model.h[1].mlp.c_fc.weight.zero_()
            kind.model.h[1].mlp.c_fc.bias.zero_()
    return kind


@pytest.mark.parametrize(("how", "roles", "name"), [("norm", "first", "c_fc"), ("up", "all", "c_proj")])
def test_a_weight_that_reads_nothing_but_zeros_is_refused_and_all_others_stay(how, roles, name):
    kind = silent(how)
    before = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    with pytest.raises(RemedyError, match=rf"h\.1\.mlp\.{name}\.weight reads nothing but zeros on this batch"):
        fullrank.repair(kind.model, "bn-orthogonalise", roles=roles, batch=kind.batch)
    assert all(torch.equal(p, before[n]) for n, p in kind.model.named_parameters())
    fullrank.repair(kind.model, "bn-orthogonalise", roles="attention", batch=kind.batch)
    assert all(bool(p.isfinite().all()) for p in kind.model.parameters())


def test_a_weight_of_two_modules_is_set_once_by_the_first():
    kind = kinds.build("llama")
    first, second = kind.model.layers[0].mlp, kind.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    old = first.up_proj.weight.detach().clone()
    read = []
    with torch.no_grad(), fullrank.repair(kind.model, "bn-orthogonalise", roles="mlp", batch=kind.batch) as handle:
        first.up_proj.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, 1)))
        kind.model(**kind.batch)
        torch.testing.assert_close(first.up_proj.weight, flattening(old, read[0], 0.5, 1e-3), rtol=1e-6, atol=1e-9)
        assert [name for name in handle.applied[0].edit.where if "up_proj" in name].count(
            "layers.0.mlp.up_proj.weight"
        ) == 1


def test_experts_are_refused():
    config = hf.MixtralConfig(**kinds.TEXT, num_key_value_heads=2, num_local_experts=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.MixtralModel(config).eval()
    batch = {"input_ids": ids(), "use_cache": False}
    with pytest.raises(RemedyError, match="is of an expert, which reads a part of the tokens; use roles=attention"):
        fullrank.repair(model, "bn-orthogonalise", batch=batch)
    fullrank.repair(model, "bn-orthogonalise", roles="attention", batch=batch).undo()


def gap(model, batch):
    """‖HᵀH/‖H‖² − I/n‖ of the tokens after the last block, the paper's orthogonality gap."""
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    G = seen[0] @ seen[0].mT
    return float((G / G.trace() - torch.eye(len(G)) / len(G)).norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_deep_mlp_without_batch_norm_keeps_its_tokens_from_becoming_alike(seed):
    """ReLU MLPs one after the other, attention switched off: the vanilla network of the paper, with its remedy."""
    config = TransformerConfig(
        depth=15, width=32, heads=2, mlp_width=32, activation="relu", placement="none", norm="none", positions="none",
        biases=False, vocabulary=40, context=32, skip_scale=0.0, output_std=0.0, up_std=2**0.5,
    )  # fmt: skip
    model = Transformer(config, seed=seed).double().eval()
    without_attention(model)
    batch = {"inputs_embeds": torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed)).double()}
    vanilla = gap(model, batch)
    with fullrank.repair(model, "bn-orthogonalise", roles="mlp", batch=batch):
        first = gap(model, batch)
    with fullrank.repair(model, "bn-orthogonalise", roles="all", batch=batch):
        every = gap(model, batch)
    assert vanilla > 0.9
    assert first < 0.7 * vanilla
    assert every < 0.4 * vanilla


def without_attention(model):
    """Let attention hand its input on, so that MLPs follow each other: W_O W_V = I and maps of one token each."""
    for block in model.blocks:
        inner = block.attention.inner
        with torch.no_grad():
            for W in (inner.value.weight, inner.output.weight):
                W.copy_(torch.eye(32))
            inner.query.weight.copy_(1e3 * torch.eye(32))
            inner.key.weight.copy_(1e3 * torch.eye(32))
