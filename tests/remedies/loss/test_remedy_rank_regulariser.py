"""The rank regulariser against its definition; how it reaches the loss; what it does to a stream."""

import kinds
import pytest
import torch
import transformers as hf
from calls import normal
from remedy_patients import build, stir

import fullrank
from fullrank.capture import survey, undisturbed
from fullrank.edit import replace_stream
from fullrank.remedies.loss.rank_regulariser import rank_loss


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 9, 4)])
def test_the_loss_is_the_root_of_one_over_the_participation_ratio(shape):
    X = normal(*shape)
    ratios = []
    for x in X:
        eigenvalues = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0)
        ratios.append(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
    r = torch.stack(ratios)
    torch.testing.assert_close(rank_loss(X), r.rsqrt().mean())
    torch.testing.assert_close(rank_loss(X, squared=True), (1 / r).mean())


def test_parallel_tokens_cost_one_and_orthonormal_ones_the_least():
    torch.testing.assert_close(rank_loss(torch.ones(1, 6, 4)), torch.tensor(1.0))
    torch.testing.assert_close(rank_loss(torch.eye(6)[None]), torch.tensor(6**-0.5))


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama_padded", "bert", "t5", "vit"])
def test_it_reads_the_streams_of_every_stack_without_their_padding(name, layers):
    case = build(name)
    states = {}
    with undisturbed(case.model), torch.no_grad():
        anatomy = survey(case.model, case)
    edits = []
    for stack in anatomy.stacks:
        depth = len(stack.paths)
        for layer in range(1, depth + 1) if layers == "all" else [depth]:
            keep = lambda X, key=(stack.name, layer): states.setdefault(key, X.detach().clone())  # noqa: E731
            edits.append(replace_stream(case.model, anatomy, keep, stack=stack.name, layer=layer))
    with torch.no_grad():
        case()
    for edit in reversed(edits):
        edit.undo()
    mask = case.batch.get("attention_mask")
    losses = []
    for X in states.values():
        rows = [x if mask is None else x[mask[i].bool()] for i, x in enumerate(X)]
        each = torch.stack([rank_loss(x[None], squared=layers == "all") for x in rows])
        losses.append(each.mean())
    with fullrank.repair(case.model, "rank-regulariser", layers=layers, weight=2.0, batch=case.batch) as repair:
        case()
        torch.testing.assert_close(repair.penalty().double(), 2 * torch.stack(losses).mean(), rtol=1e-6, atol=0)


def _language_model():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**kinds.TEXT, num_key_value_heads=2)).double()
    stir(list(model.parameters()))
    ids = kinds.ids()
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def test_it_is_added_to_the_loss_in_training_alone():
    with torch.random.fork_rng():
        model, batch = _language_model()
    plain = model.eval()(**batch).loss
    with fullrank.repair(model, "rank-regulariser", batch=batch) as repair:
        torch.testing.assert_close(model.eval()(**batch).loss, plain, rtol=0, atol=0)
        trained = model.train()(**batch).loss
        torch.testing.assert_close(trained, plain + model.fullrank_rank_regulariser.value().float(), rtol=1e-6, atol=0)
        assert float(repair.penalty()) == 0  # the loss has it
        assert float(trained.detach()) > float(plain.detach()) + 0.01


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("layers", ["last", "all"])
def test_under_checkpointing_it_counts_once_and_has_the_same_gradients(layers):
    found = []
    for checkpointed in (False, True):
        with torch.random.fork_rng():
            model, batch = _language_model()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fullrank.repair(model, "rank-regulariser", layers=layers, weight=1.0, batch=batch)
        model.train()
        loss = model(**batch).loss
        before = float(model.fullrank_rank_regulariser.value().detach())
        assert before > 0
        loss.backward()
        assert float(model.fullrank_rank_regulariser.value().detach()) == before
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_for_a_stream_whose_tokens_are_parallel_training_makes_its_rank_grow():
    """BERT whose position and word embeddings were shrunk beside a common vector: 60 steps on the penalty alone."""
    case = build("bert")
    with torch.no_grad():
        for n, p in case.model.named_parameters():
            if n.endswith("embeddings.weight") and "token_type" not in n:
                p.mul_(0.05)
    with fullrank.repair(case.model, "rank-regulariser", weight=1.0, batch=case.batch) as repair:
        optimiser = torch.optim.Adam(case.model.parameters(), lr=3e-3)
        rank = []
        for _ in range(60):
            optimiser.zero_grad()
            case()
            penalty = repair.penalty()
            rank.append(float(penalty.detach()) ** -2)
            penalty.backward()
            optimiser.step()
        assert rank[0] < 1.5
        assert rank[-1] > 2.5 * rank[0]
