"""Batch norm in the place of norms of tokens, against moments over the gathered real tokens."""

import copy

import kinds
import pytest
import torch
from blocks import reference_path
from normed import normed, norms_of
from plain import PlainGPT, tokens
from remedy_patients import build, stir
from schemes import deep, repaired_states, residual, states

import fullrank
from fullrank.errors import FullrankError, RemedyError
from fullrank.remedies.residual.batch_norm import TokenBatchNorm

NAMES = ("gpt2", "llama_padded", "bert", "vit", "torch_encoder", "torch_tokens_first", "plain", "t5")
FLOAT32 = ("llama_padded", "t5")  # norms in it whatever the weights


def real_of(kind, state):
    """(sequences, tokens) of a state that is (sequences, tokens, width), or has the tokens first."""
    mask = kind.batch.get("attention_mask")
    hidden = kind.batch.get("src_key_padding_mask")
    if mask is None and hidden is None:
        return torch.ones(state.shape[:2], dtype=torch.bool)
    return mask.bool() if mask is not None else ~hidden


class ByHand:
    """Each norm with moments over real tokens, gathered; moments are kept, or those that were kept are used."""

    def __init__(self, kind, model, eps=1e-5):
        self.moments, self.fixed = {}, False
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower() and "embeddings" not in name:
                module.forward = self._forward(kind, name, module, eps)

    def _forward(self, kind, name, module, eps):
        def forward(X):
            if not self.fixed:
                tokens = X[real_of(kind, X)]
                mean = sum(tokens) / len(tokens)
                self.moments[name] = (mean, sum((tokens - mean) ** 2) / len(tokens))
            mean, variance = self.moments[name]
            shift = getattr(module, "bias", None)
            return module.weight * (X - mean) / (variance + eps).sqrt() + (0 if shift is None else shift)

        return forward


def other_batch(kind):
    return {
        name: (value + 1) % 50 if "ids" in name else 0.9 * value + 0.1 if value.is_floating_point() else value
        for name, value in kind.batch.items()
        if isinstance(value, torch.Tensor)
    } | {name: value for name, value in kind.batch.items() if not isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_of_real_tokens_and_stay_those_in_evaluation(name):
    kind = kinds.build(name)
    twin = copy.copy(kind)
    twin.model = copy.deepcopy(kind.model)
    hand = ByHand(twin, twin.model)
    tolerance = 2e-4 if name in FLOAT32 else 1e-8
    with reference_path(), torch.no_grad():
        plain = kind()
        with fullrank.repair(kind.model, "batch-norm", batch=kind.batch) as repair:
            assert repair.parameters == 0
            found, expected = kind(), twin()
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            assert not torch.allclose(found, plain, atol=1e-2)
            hand.fixed = True
            kind.batch = twin.batch = other_batch(kind)
            torch.testing.assert_close(kind(), twin(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["bert", "plain"])
def test_in_training_they_are_those_of_the_batch_and_move_the_running_ones(name):
    kind = kinds.build(name)
    with torch.no_grad(), fullrank.repair(kind.model, "batch-norm?momentum=0.25", batch=kind.batch):
        modules = {n: m for n, m in kind.model.named_modules() if isinstance(m, TokenBatchNorm)}
        before = {n: (m.mean.clone(), m.variance.clone()) for n, m in modules.items()}
        kind.batch = other_batch(kind)
        twin = copy.copy(kind)
        twin.model = kinds.build(name).model
        hand = ByHand(twin, twin.model)
        for module in modules.values():
            module.training = True
        torch.testing.assert_close(kind(), twin(), rtol=0, atol=1e-8)
        for n, module in modules.items():
            for at, now in enumerate((module.mean, module.variance)):
                theirs = hand.moments[n.removesuffix(".fullrank_batch_norm")][at]
                torch.testing.assert_close(now, 0.75 * before[n][at] + 0.25 * theirs)


def test_padding_has_no_part_in_it():
    kind = kinds.build("bert")
    real = kind.batch["attention_mask"].bool()
    with torch.no_grad(), fullrank.repair(kind.model, "batch-norm", batch=kind.batch):
        for module in kind.model.modules():
            module.training = isinstance(module, TokenBatchNorm)
        found = kind()
        kind.batch["input_ids"] = torch.where(real, kind.batch["input_ids"], 7)
        torch.testing.assert_close(kind()[real], found[real], rtol=0, atol=1e-12)


def test_a_mask_that_comes_later_and_is_not_known_is_said():
    kind = kinds.build("llama")
    padding = kinds.build("llama_padded").batch["attention_mask"]
    with (
        torch.no_grad(),
        fullrank.repair(kind.model, "batch-norm", batch=kind.batch),
        pytest.raises(FullrankError, match="repair it with a padded batch"),
    ):
        kind.model(**kind.batch, attention_mask=padding)
    kind = kinds.build("llama_padded")
    mask = kind.batch["attention_mask"]
    with torch.no_grad(), fullrank.repair(kind.model, "batch-norm", batch=kind.batch):
        for module in kind.model.modules():
            module.training = isinstance(module, TokenBatchNorm)
        full = kind.model(input_ids=kind.batch["input_ids"], use_cache=False)[0]
        ones = kind.model(input_ids=kind.batch["input_ids"], attention_mask=torch.ones_like(mask), use_cache=False)[0]
        torch.testing.assert_close(full, ones)


def test_what_is_no_norm_of_tokens_is_refused():
    model, X = deep(2, width=32, norm="batchnorm")
    with pytest.raises(RemedyError, match="is a batch norm already"):
        fullrank.repair(model, "batch-norm", batch={"inputs_embeds": X})
    model, X = deep(2, width=32, norm="none", placement="none")
    with pytest.raises(RemedyError, match="has no norm before a branch or after the sum"):
        fullrank.repair(model, "batch-norm", batch={"inputs_embeds": X})
    kind = kinds.build("albert")
    with pytest.raises(RemedyError, match="shared by several layers"):
        fullrank.repair(kind.model, "batch-norm", batch=kind.batch)


def test_a_norm_that_a_block_calls_twice_is_refused():
    model = PlainGPT(layers=2)
    for block in model.h:
        block.ln_2 = block.ln_1
    with pytest.raises(RemedyError, match=r"the norm h\.0\.ln_1 is called 2 times, and batch-norm needs one for each"):
        fullrank.repair(model.eval(), "batch-norm", batch=(tokens(),))


@pytest.mark.parametrize("first", ["skip-init", "rezero?norms=keep", "peri-norm?start=0"])
def test_behind_branches_that_begin_at_zero_norms_are_found_all_the_same(first):
    case, expected = (build("gpt2"), 6 + 6 + 1) if first.startswith("peri") else (normed("olmo2"), 6 + 1)
    with torch.no_grad(), fullrank.repair(case.model, [first, "batch-norm"], batch=case.batch):
        assert sum(isinstance(module, TokenBatchNorm) for module in case.model.modules()) == expected


def test_the_scale_of_a_branch_stays_behind_the_norm_that_is_replaced():
    case, hand = normed("olmo2"), normed("olmo2")
    with torch.no_grad():
        with fullrank.repair(case.model, ["skip-init", "batch-norm"], batch=case.batch):
            added = {n: p for n, p in case.model.named_parameters() if n.endswith("alpha")}
            stir(added)
            alpha = [float(p) for _, p in sorted(added.items())]  # by layer, attention first
            found = case()
            moments = {n: (m.mean, m.variance) for n, m in case.model.named_modules() if isinstance(m, TokenBatchNorm)}
        for layer in (1, 2, 3):
            for place, norm in enumerate(norms_of(hand.model, layer)[0]):
                _by_hand(hand.model, norm, moments, alpha[2 * (layer - 1) + place])
        _by_hand(hand.model, hand.model.norm, moments, 1.0)
        torch.testing.assert_close(found, hand(), rtol=0, atol=1e-5)


def _by_hand(model, norm, moments, factor):
    (name,) = [name for name, module in model.named_modules() if module is norm]
    mean, variance = moments[f"{name}.fullrank_batch_norm"]
    norm.forward = lambda X: factor * norm.weight * (X - mean) / (variance + 1e-5).sqrt()


def test_a_model_in_half_precision_keeps_moments_in_float32():
    model, X = deep(2, width=32)
    model, X = model.bfloat16(), X.bfloat16()
    with torch.no_grad(), fullrank.repair(model, "batch-norm", batch={"inputs_embeds": X}):
        assert {b.dtype for n, b in model.named_buffers() if n.endswith((".mean", ".variance"))} == {torch.float32}
        assert model(inputs_embeds=X).logits.dtype == torch.bfloat16


def test_deep_models_keep_tokens_apart():
    model, X = deep(12, placement="post")
    assert residual(states(model, X)[-1]) < 0.2
    assert residual(repaired_states(model, X, "batch-norm")[-1]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_it_is_one_graph_for_a_compiler(name):
    kind = kinds.build(name)
    torch._dynamo.reset()
    with torch.no_grad(), fullrank.repair(kind.model, "batch-norm", batch=kind.batch):
        compiled = torch.compile(kind.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**kind.batch)[0], kind(), rtol=0, atol=1e-10)
    torch._dynamo.reset()
