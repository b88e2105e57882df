"""Orthogonal initialisation: orthonormal rows or columns, uniform among all of them, and what it keeps in depth."""

import kinds
import pytest
import torch
from matrices import NAMES, matrices, others

import fullrank
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def assert_orthonormal(W, gain):
    """Of whichever of rows and columns there are fewer."""
    small = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    torch.testing.assert_close(small, gain**2 * torch.eye(len(small)).to(W), rtol=0, atol=1e-12 * (1 + gain**2))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_orthogonal_times_its_gain(name):
    kind = kinds.build(name)
    rest = others(kind.model, matrices(name, kind.model))
    with fullrank.repair(kind.model, "orthogonal-init", gain=0.5, mlp_gain=2**0.5, batch=kind.batch):
        for (_, _, role), W in matrices(name, kind.model).items():
            gain = 2**0.5 if role in ("up", "gate", "down") else 0.5
            assert_orthonormal(W, gain * (8**-0.5 if name == "t5" and role in ("q", "cross.q") else 1))
        for n, p in kind.model.named_parameters():
            assert n not in rest or torch.equal(p, rest[n])


@pytest.mark.parametrize("name", ["gpt2", "llama", "torch_encoder"])
def test_by_head_each_head_is_orthogonal_and_heads_are_independent(name):
    kind = kinds.build(name)
    with fullrank.repair(kind.model, "orthogonal-init", by="head", roles="attention", batch=kind.batch):
        found = matrices(name, kind.model)
    for (_, _, role), W in found.items():
        if role in "qkvo":
            heads = (W.mT if role == "o" else W).split(8)
            for head in heads:
                assert_orthonormal(head, 1)
            assert (heads[0] @ heads[1].mT).abs().max() > 0.05
    for key, W in matrices(name, kinds.build(name).model).items():
        assert key[2] in "qkvo" or torch.equal(W, found[key])


def test_draws_are_uniform_the_diagonal_has_mean_zero_and_the_seed_decides():
    kind, corners = kinds.build("plain"), []
    for seed in (*range(20), 0):
        with fullrank.repair(kind.model, "orthogonal-init", seed=seed, roles="attention", batch=kind.batch):
            found = matrices("plain", kind.model)
            corners.append(torch.stack([found["decoder", layer, "o"].diagonal() for layer in (1, 2, 3)]))
    assert torch.equal(corners[0], corners[-1])
    z = torch.cat(corners[:-1]) * 32**0.5  # QR without the choice of signs has a diagonal of one sign first
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert float(z.square().mean()) == pytest.approx(1, abs=0.2)
    assert abs(float(z[:, 0].mean())) < 5 / 60**0.5


def test_a_linear_mlp_of_orthogonal_weights_keeps_every_direction_and_one_of_normal_weights_loses_them():
    config = TransformerConfig(
        depth=12, width=24, heads=1, mlp_width=24, activation="identity", placement="none", norm="none",
        positions="none", biases=False, vocabulary=8, context=24, skip_scale=0.0, output_std=0.0,
    )  # fmt: skip
    X = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(1)).double()
    model = Transformer(config, seed=0).double().eval()

    def condition():
        Y = X[0]
        for block in model.blocks:  # attention is switched off: the MLPs one after the other
            Y = block.mlp.inner(Y)
        s, s0 = torch.linalg.svdvals(Y), torch.linalg.svdvals(X[0])
        return float((s[0] / s[-1]) / (s0[0] / s0[-1]))

    with torch.no_grad():
        assert condition() > 1e4
        with fullrank.repair(model, "orthogonal-init", roles="mlp", batch={"inputs_embeds": X}):
            assert condition() == pytest.approx(1, rel=1e-6)
