"""Initialisation by its rate: the size of every weight, and what a small one does to training."""

import kinds
import pytest
import torch
from matrices import NAMES, erank, matrices, others, rms

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def wanted(name, key, W, gamma):
    """d_in^−γ; T5 multiplies no score by 1/√8, so that its W_Q does."""
    return W.shape[1] ** -gamma * (8**-0.5 if name == "t5" and key[2] in ("q", "cross.q") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_a_block_has_the_size_of_its_inputs_to_the_rate_in_its_old_direction(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    rest = others(kind.model, before)
    with fullrank.repair(kind.model, "small-init", gamma=0.7, batch=kind.batch):
        for key, W in matrices(name, kind.model).items():
            old = before[key]
            torch.testing.assert_close(W, old / rms(old) * wanted(name, key, old, 0.7), rtol=1e-12, atol=0)
        for n, p in kind.model.named_parameters():
            assert n not in rest or torch.equal(p, rest[n])
    assert rest


@pytest.mark.parametrize("name", ["gpt2", "t5", "torch_encoder"])
def test_drawn_weights_are_normal_of_that_size_and_the_seed_decides(name):
    drawn = []
    for seed in (0, 0, 1):
        kind = kinds.build(name)
        with fullrank.repair(kind.model, "small-init", gamma=0.5, how="draw", seed=seed, batch=kind.batch):
            drawn.append(matrices(name, kind.model))
    one, again, other = drawn
    for key, W in one.items():
        assert torch.equal(W, again[key])
        assert not torch.equal(W, other[key])
        z = W / wanted(name, key, W, 0.5)
        n = W.numel()
        assert abs(float(z.mean())) < 5 / n**0.5
        assert float(z.square().mean()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
        assert float(z.pow(4).mean()) == pytest.approx(3, abs=6 * (96 / n) ** 0.5)
    assert len({W.flatten()[0].item() for W in one.values()}) == len(one)  # none is another's draw


def test_a_weight_of_zeros_has_no_direction_and_is_refused():
    kind = kinds.build("gpt2")
    with torch.no_grad():
        kind.model.h[1].mlp.c_proj.weight.zero_()
    state = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    with pytest.raises(RemedyError, match=r"'down' of layer 2 cannot be rescaled .* use how=draw"):
        fullrank.repair(kind.model, "small-init", batch=kind.batch)
    assert all(torch.equal(p, state[n]) for n, p in kind.model.named_parameters())
    with fullrank.repair(kind.model, "small-init", how="draw", batch=kind.batch):
        assert kind.model.h[1].mlp.c_proj.weight.abs().max() > 0


def ranks_in_training(gamma):
    """Effective rank of W_V and W_up before and after 60 steps on sums of two tokens; embeddings and head fixed."""
    config = TransformerConfig(
        depth=1,
        width=32,
        heads=1,
        mlp_width=64,
        activation="tanh",
        placement="none",
        norm="none",
        positions="none",
        biases=False,
        vocabulary=24,
        context=6,
        classes=24,
        pooling="last",
    )
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(24, (256, 6), generator=generator)
    labels = (ids[:, 0] + ids[:, -1]) % 24
    batch = {"input_ids": ids, "labels": labels}
    fullrank.repair(model, "small-init", gamma=gamma, how="draw", batch=batch)
    weights = [model.blocks[0].attention.inner.value.weight, model.blocks[0].mlp.inner.up.weight]
    before = [erank(W.detach()) for W in weights]
    trained = list(model.blocks.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return torch.tensor([after / was for after, was in zip([erank(W.detach()) for W in weights], before, strict=True)])


def test_a_small_start_condenses_and_a_large_one_does_not():
    small, large = ranks_in_training(1.2), ranks_in_training(0.5)
    assert (small < 0.8).all()
    assert (large > 0.95).all()
