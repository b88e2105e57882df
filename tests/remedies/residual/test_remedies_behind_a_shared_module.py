"""BEiT: both branches of a block leave through one module, and each is reached; blocks by hand."""

import kinds
import pytest
import torch
import transformers as hf
from remedy_patients import stir

import fullrank

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def model():
    sizes = {name: value for name, value in kinds.TEXT.items() if name != "vocab_size"}
    found = hf.BeitModel(hf.BeitConfig(**sizes, image_size=16, patch_size=4, drop_path_rate=0.0)).double().eval()
    stir(list(found.parameters()))
    return found


def by_hand(model, skips=(1.0, 1.0), alpha=1.0, moments=False):
    """λX + αF at each addition; with norms of tokens, or with those of a batch."""

    def normed(norm, X):
        if not moments:
            return norm(X)
        tokens = X.flatten(0, 1)
        variance = ((tokens - tokens.mean(0)) ** 2).mean(0)
        return norm.weight * (X - tokens.mean(0)) / (variance + 1e-5).sqrt() + norm.bias

    X = model.embeddings(IMAGES)
    X = X[0] if isinstance(X, tuple) else X
    for block in model.layers:
        F = block.lambda_1 * block.attention(normed(block.layernorm_before, X))[0]
        X = skips[0] * X + alpha * F
        X = skips[1] * X + alpha * block.lambda_2 * block.mlp(normed(block.layernorm_after, X))
    return model.layernorm(X) if isinstance(model.layernorm, torch.nn.LayerNorm) else X


@pytest.mark.parametrize(
    ("remedy", "hand"),
    [
        ("residual-scale?by=number&alpha=0.3", {"alpha": 0.3}),
        ("lambda-skip?strength=-2", {"skips": (-2.0, 1.0)}),
        ("lambda-skip?strength=1.5&at=all", {"skips": (1.5, 1.5)}),
        ("batch-norm?momentum=1&final=false", {"moments": True}),
    ],
)
def test_each_branch_is_reached(model, remedy, hand):
    with torch.no_grad():
        plain = model(pixel_values=IMAGES)[0]
        torch.testing.assert_close(plain, by_hand(model), rtol=0, atol=1e-10)
        with fullrank.repair(model, remedy, batch={"pixel_values": IMAGES}):
            found = model(pixel_values=IMAGES)[0]
        torch.testing.assert_close(found, by_hand(model, **hand), rtol=0, atol=1e-6)
        assert not torch.allclose(found, plain, atol=1e-2)
