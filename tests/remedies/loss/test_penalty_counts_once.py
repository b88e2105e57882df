"""`loss + repair.penalty()` has the penalty in it once, whoever made the loss."""

import copy

import kinds
import pytest
import torch
import transformers as hf
from torch.nn import functional

import fullrank
from fullrank.remedies import penalty_of


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = hf.LlamaForCausalLM(hf.LlamaConfig(**kinds.TEXT, num_key_value_heads=2)).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return found


BATCH = {"input_ids": kinds.ids(), "labels": kinds.ids(), "use_cache": False}
UNLABELLED = {name: value for name, value in BATCH.items() if name != "labels"}
NAMES = ["entropy-regulariser?theta=1&margin=0&weight=3", "rank-regulariser?weight=2"]


def of_logits(model, **batch):
    logits = model(**batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), BATCH["labels"][:, 1:].flatten())


LOOPS = {
    "the model's own loss": lambda model: model(**BATCH).loss,
    "a function that returns it": lambda model: (lambda network, batch: network(**batch).loss)(model, BATCH),
    "a loss of the logits": lambda model: of_logits(model, **UNLABELLED),
    "the model's own loss in a tuple": lambda model: model(**BATCH, return_dict=False)[0],
}


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:], NAMES], ids=["entropy", "rank", "both"])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_has_the_same_gradients(model, loop, names):
    twin = copy.deepcopy(model).train()
    plain = gradients(twin, twin(**BATCH).loss)
    repair = fullrank.repair(model, names, batch=UNLABELLED)
    model.train()
    model(**UNLABELLED)
    penalty = gradients(model, repair.penalty())
    assert any(float(g.abs().max()) > 1e-3 for g in penalty.values())
    found = gradients(model, LOOPS[loop](model) + repair.penalty())
    for name, gradient in found.items():
        expected = plain[name] + penalty.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_it_is_of_the_latest_forward(model):
    repair = fullrank.repair(model, NAMES, batch=UNLABELLED)
    assert float(repair.penalty()) == 0  # nothing is left of the proof
    model.train()
    model(**BATCH)
    assert float(repair.penalty()) == 0  # the loss has it
    model(**UNLABELLED)
    assert float(repair.penalty().detach()) > 0
    model(**BATCH)
    twin = copy.deepcopy(model)
    assert float(penalty_of(twin)) == 0
    twin(**UNLABELLED)
    assert float(penalty_of(twin).detach()) > 0
    model.eval()
    model(**BATCH)
    assert float(repair.penalty().detach()) > 0  # in evaluation mode the loss is without it


def test_a_theta_that_only_the_penalty_depends_on_has_a_part(model):
    repair = fullrank.repair(model, "entropy-regulariser?learnable=true&margin=0", batch=UNLABELLED)
    assert repair.applied[0].proof.unheard == ()
    assert repair.notes == ()
