"""Lambda-skip: blocks by hand, a layer of the paper's, and what it is for in deep post-norm models."""

import math

import kinds
import pytest
import torch
from blocks import NAMES, by_hand, close, repaired
from plain import Attention, PlainGPT, sharp, tokens
from schemes import deep, repaired_states, residual, states
from torch import nn

import fullrank
from fullrank.errors import RemedyError
from golden import assert_golden

PLACE = {"attention": 0, "mlp": 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [3.0, -1.5])
def test_the_skip_of_attention_is_multiplied(name, strength):
    found, added = repaired(name, "lambda-skip", strength=strength)
    assert not added
    close(found, by_hand(name, lambda layer, b, X, F: (strength if b == "attention" else 1) * X + F))


@pytest.mark.parametrize("name", NAMES)
def test_every_skip_may_learn_its_own(name):
    found, strength = repaired(name, "lambda-skip", at="all", learnable=True, strength=1.2)
    assert [one.shape for one in strength] == [(1,)] * 6
    close(found, by_hand(name, lambda layer, b, X, F: strength[2 * (layer - 1) + PLACE[b]] * X + F))


@pytest.mark.parametrize("learnable", [False, True])
def test_the_skip_of_parallel_branches_is_multiplied_whichever_comes_first_in_their_sum(learnable):
    kind = kinds.build("falcon")
    with torch.no_grad():
        with fullrank.repair(kind.model, "lambda-skip", strength=2.5, learnable=learnable, batch=kind.batch) as repair:
            assert repair.parameters == (3 if learnable else 0)
            found = kind()
        for block in kind.blocks("decoder"):  # λX + F = (X + F) + (λ − 1)X
            block.register_forward_hook(lambda m, args, output: (output[0] + 1.5 * args[0], *output[1:]))
        close(found, kind())


class Three(nn.Module):
    """Attention and a map that are summed before they are added, and a second map that is added by itself."""

    def __init__(self, width, heads, **options):
        super().__init__()
        self.skip = 1.0
        self.one, self.two = (nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))
        self.attention = Attention(width, heads, **options)

    def forward(self, X):
        X = self.skip * X + (self.one(X) + self.attention(X))
        return X + self.two(X)


def test_a_branch_that_is_added_later_by_itself_keeps_its_skip():
    model = sharp(PlainGPT(layers=2, block=Three))
    with torch.no_grad():
        with fullrank.repair(model, "lambda-skip?strength=3", batch=(tokens(),)):
            found = model(tokens())
        for block in model.h:
            block.skip = 3.0
        close(found, model(tokens()), 1e-5)


def test_a_plain_model_becomes_the_one_that_is_built_with_it():
    model, X = deep(3, width=32, placement="post")
    twin, _ = deep(3, width=32, placement="post", skip_scale=4.0)
    with torch.no_grad(), fullrank.repair(model, "lambda-skip?strength=4&at=all", batch={"inputs_embeds": X}):
        close(model(inputs_embeds=X).logits, twin(inputs_embeds=X).logits, 1e-4)


def test_where_no_norm_follows_the_sum_a_strength_that_overflows_is_refused():
    model, X = deep(6, width=32)
    with pytest.raises(RemedyError, match=r"by 100 at each of 6 skips, and no norm follows the sum.* at most 40\.3"):
        fullrank.repair(model, "lambda-skip?strength=100", batch={"inputs_embeds": X})
    with fullrank.repair(model, "lambda-skip?strength=40", batch={"inputs_embeds": X}):
        assert bool(torch.isfinite(model(inputs_embeds=X).logits).all())
    post, X = deep(6, width=32, placement="post")
    fullrank.repair(post, "lambda-skip?strength=100", batch={"inputs_embeds": X}).undo()


# ------------------------------------------------------------ layers of the paper


class Layer(nn.Module):
    """Y ← rows at length 1 of (softmax(G) Y C + Y), with G of independent normal numbers."""

    def __init__(self, count, width, generator):
        super().__init__()
        drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.drawn = {"identity": torch.eye(width).double(), "gaussian": drawn / math.sqrt(width)}
        self.drawn["orthogonal"] = torch.linalg.qr(drawn)[0]
        self.mix = Mixing(count, generator)
        self.value = nn.Linear(width, width, bias=False, dtype=torch.float64)
        self.norm = Rows()

    def forward(self, Y):
        return self.norm(Y + self.value(self.mix(Y)))


class Mixing(nn.Module):
    def __init__(self, count, generator):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(count, count, generator=generator, dtype=torch.float64))

    def forward(self, Y):
        return torch.softmax(self.logits.expand(len(Y), -1, -1), -1) @ Y


class Rows(nn.Module):
    def forward(self, Y):
        return Y / Y.norm(dim=-1, keepdim=True)


def test_the_law_through_the_remedy():
    """64 layers of 32 tokens; what is left of μ²/‖Y‖²."""
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(1, 32, 32, generator=generator, dtype=torch.float64)
    Y = Y / Y.norm(dim=-1, keepdim=True)
    model = nn.Sequential(*(Layer(32, 32, generator) for _ in range(64)))

    def share(strength, value="identity"):
        for layer in model:
            layer.value.weight.data = layer.drawn[value]
        for name, p in model.named_parameters():
            if name.endswith("strength"):
                p.data.fill_(strength)
        with torch.no_grad():
            out = model(Y)[0]
        return float((out - out.mean(0)).square().sum() / out.square().sum())

    with fullrank.repair(model, "lambda-skip?learnable=true&at=all&strength=1", batch=(Y,)):
        assert_golden("ls-law-collapsed", [share(0.0), share(1.0)])
        assert_golden("ls-law-slow", share(5.0))
        assert_golden("ls-law-negative", [share(-1.0), share(-2.0)])
        assert_golden("ls-orthogonal-value", share(5.0, "orthogonal"))
        assert_golden("ls-gaussian-value", share(5.0, "gaussian"))


def test_deep_post_norm_models_keep_tokens_apart():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    assert residual(repaired_states(model, X, "lambda-skip?at=all")[-1]) > 0.85
