"""The rank regulariser against its definition; how it reaches the loss; what it does to a stream."""

import kinds
import pytest
import torch
import transformers as hf
from blocks import reference_path
from calls import normal
from remedy_patients import build, stir
from torch import nn

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


def _t5(**batch):
    model = build("t5").model
    source = kinds.ids(3, 8)
    return model, {"input_ids": source, "decoder_input_ids": source.flip(1), "use_cache": False, **batch}


def _last_states(model, batch):
    found = {}
    hooks = [
        getattr(model, name).final_layer_norm.register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(name, args[0].detach())
        )
        for name in ("encoder", "decoder")
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def _expected(states, masks):
    losses = []
    for name, X in states.items():
        mask = masks.get(name)
        rows = [x if mask is None else x[mask[i].bool()] for i, x in enumerate(X)]
        losses.append(torch.stack([rank_loss(x[None]) for x in rows]).mean())
    return torch.stack(losses).mean()


SHORT = torch.tensor([[1] * 3 + [0] * 5, [1] * 8, [1] * 6 + [0] * 2])
SHORTER = torch.tensor([[1] * 8, [1] * 2 + [0] * 6, [1] * 5 + [0] * 3])


@pytest.mark.parametrize("source", [None, SHORT])
@pytest.mark.parametrize("target", [None, SHORTER])
def test_source_and_target_of_one_length_have_each_their_own_padding(source, target):
    model, batch = _t5()
    masks = {"attention_mask": source, "decoder_attention_mask": target}
    batch |= {name: mask for name, mask in masks.items() if mask is not None}
    states = _last_states(model, batch)
    with fullrank.repair(model, "rank-regulariser", weight=1.0, batch=batch) as repair:
        model(**batch)
        expected = _expected(states, {"encoder": source, "decoder": target})
        torch.testing.assert_close(repair.penalty().detach().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama_padded"])
def test_a_mask_by_place_is_one_by_name(name):
    case = build(name)
    with fullrank.repair(case.model, "rank-regulariser", weight=1.0, batch=case.batch) as repair:
        case()
        named = repair.penalty().detach()
        case.model(case.batch["input_ids"], case.batch["attention_mask"])
        torch.testing.assert_close(repair.penalty().detach(), named, rtol=0, atol=0)
        case.model(case.batch["input_ids"])
        assert abs(float(repair.penalty().detach() - named)) > 1e-5


def test_padding_that_attention_is_told_of_by_another_name_is_left_out():
    case = build("torch_encoder")
    real = ~case.batch["src_key_padding_mask"]
    with reference_path(), fullrank.repair(case.model, "rank-regulariser", weight=1.0, batch=case.batch) as repair:
        X = case()
        losses = [rank_loss(x[real[i]][None]) for i, x in enumerate(X.detach())]
        torch.testing.assert_close(repair.penalty().detach().double(), torch.stack(losses).mean(), rtol=1e-6, atol=0)


class Recurrent(nn.Module):
    """Blocks without attention, told of padding by name."""

    def __init__(self):
        super().__init__()
        self.model = build("zoo_state_space").model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids).logits


@pytest.mark.parametrize("by_name", [True, False])
def test_without_attention_the_argument_of_that_name_tells(by_name):
    model, ids = Recurrent(), kinds.ids(3, 8)
    called = {"input_ids": ids, "attention_mask": SHORT}
    states = []
    hook = model.model.blocks[-1].register_forward_hook(lambda module, args, output: states.append(output.detach()))
    with torch.no_grad():
        model(**called)
    hook.remove()
    with fullrank.repair(model, "rank-regulariser", weight=1.0, batch=called) as repair:
        model(**called) if by_name else model(ids, SHORT)
        expected = _expected({"decoder": states[0]}, {"decoder": SHORT})
        torch.testing.assert_close(repair.penalty().detach().double(), expected, rtol=1e-6, atol=0)
        assert abs(float(expected - _expected({"decoder": states[0]}, {}))) > 1e-4
