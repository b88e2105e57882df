"""Holistic norm: blocks by hand, padding, what it keeps of tokens, refusals."""

import pytest
import torch
from remedy_patients import build
from schemes import deep
from torch import nn

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig


def moments(X, real, eps):
    """Mean and size of each sample, by loops over samples."""
    rows = [X[i][real[i]] for i in range(len(X))]
    mean = torch.stack([row.sum() / row.numel() for row in rows])[:, None, None]
    square = torch.stack([((row - row.sum() / row.numel()) ** 2).sum() / row.numel() for row in rows])
    return mean, (square + eps).sqrt()[:, None, None]


def affine(norm, X):
    return norm.weight * X + (0 if getattr(norm, "bias", None) is None else norm.bias)


def by_hand(model, X, real, blocks, eps, final):
    for norms, branches in blocks:
        for norm, branch in zip(norms, branches, strict=True):
            mean, std = moments(X, real, eps)
            X = X + std * branch(affine(norm, (X - mean) / std))
    return affine(final, X)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_a_vision_model_by_hand(eps):
    case = build("vit")
    model = case.model
    blocks = [
        ((b.layernorm_before, b.layernorm_after), (lambda z, b=b: b.attention(z)[0], b.mlp)) for b in model.layers
    ]
    with torch.no_grad():
        X = model.embeddings(case.batch["pixel_values"])
        expected = by_hand(model, X, torch.ones(X.shape[:2], dtype=torch.bool), blocks, eps, model.layernorm)
        with fullrank.repair(model, "holistic-norm", batch=case.batch, eps=eps) as repair:
            assert repair.parameters == 0
            torch.testing.assert_close(case(), expected, rtol=0, atol=1e-9)


def padded(norm="layernorm", width=32):
    config = TransformerConfig(
        depth=3, width=width, heads=4 if width % 4 == 0 else 3, vocabulary=20, norm=norm, positions="none"
    )
    model = Transformer(config, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator).double())
    ids = torch.randint(20, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 0] + [1] * 5])
    return model, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("norm", "width"), [("layernorm", 32), ("rmsnorm", 32), ("layernorm", 33), ("rmsnorm", 33)])
def test_an_encoder_by_hand_with_padding_left_out_of_the_moments(norm, width):
    model, batch = padded(norm, width)
    real = batch["attention_mask"].bool()
    visible = real[:, None, None, :].expand(-1, 1, 7, -1)
    blocks = [
        (
            (b.attention.before, b.mlp.before),
            (lambda z, b=b: b.attention.inner(z, visible), b.mlp.inner),
        )
        for b in model.blocks
    ]
    with torch.no_grad():
        X = model.embedding(batch["input_ids"])
        expected = model.head(by_hand(model, X, real, blocks, 1e-5, model.final_norm))
        with fullrank.repair(model, "holistic-norm", batch=batch):
            found = model(**batch).logits
            torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-8)
            batch["input_ids"] = torch.where(real, batch["input_ids"], 3)
            torch.testing.assert_close(model(**batch).logits[real], found[real], rtol=0, atol=1e-10)


def test_gradients_reach_the_gains_and_shifts_of_the_norms():
    model, batch = padded()
    with fullrank.repair(model, "holistic-norm", batch=batch):
        model(**batch).logits.square().sum().backward()
        for name, p in model.named_parameters():
            if "before" in name or "final_norm" in name:
                assert p.grad.abs().min() > 0, name


class Apart(nn.Module):
    """Parallel branches that are added one after the other: the second is not added to what it read."""

    def __init__(self, block):
        super().__init__()
        self.attention, self.mlp = block.attention, block.mlp

    def forward(self, X, visible=None):
        return X + self.attention(X, visible) + self.mlp(X)


def test_what_it_does_not_fit_is_refused():
    model, X = deep(2, width=32, mask="causal")
    with pytest.raises(RemedyError, match="moments over all tokens would look ahead"):
        fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X})
    model, X = deep(2, width=32, placement="peri")
    with pytest.raises(RemedyError, match=r"stand otherwise \(peri\)"):
        fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X})
    model, X = deep(2, width=32)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Apart(block)
    with pytest.raises(RemedyError, match="mlp of encoder layer 1 reads another state than it is added to"):
        fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X})
    model, X = deep(2, width=32, parallel=True)
    fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X}).undo()


def test_tokens_of_other_sizes_stay_so_where_norms_of_tokens_make_them_one():
    model, X = deep(1, width=64)
    X = X * torch.linspace(1, 10, X.shape[1])[:, None]

    def sizes():
        seen = []
        hook = model.blocks[0].attention.inner.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
        with torch.no_grad():
            model(inputs_embeds=X)
        hook.remove()
        return seen[0].norm(dim=-1)

    assert float(sizes().max() / sizes().min()) < 1.01
    with fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X}):
        expected = (X[0] - X.mean()).norm(dim=-1)
        torch.testing.assert_close(sizes() / sizes()[0], expected / expected[0], rtol=1e-4, atol=0)
        assert float(sizes().max() / sizes().min()) > 8


def test_branches_count_as_much_whatever_the_size_of_the_stream():
    model, X = deep(2, width=64)

    def share(size):
        with torch.no_grad():
            X_1 = model.blocks[0](size * X)
        return float((X_1 - size * X).norm() / (size * X).norm())

    assert share(100.0) < 0.05 * share(1.0)
    with fullrank.repair(model, "holistic-norm", batch={"inputs_embeds": X}):
        assert share(100.0) == pytest.approx(share(1.0), rel=1e-3)


def test_a_norm_that_a_block_calls_twice_is_refused():
    case = build("vit")
    for block in case.model.layers:
        block.layernorm_after = block.layernorm_before
    with pytest.raises(RemedyError, match="is called 2 times, and holistic-norm needs one for each call"):
        fullrank.repair(case.model, "holistic-norm", batch=case.batch)
