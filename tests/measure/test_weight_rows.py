"""Rows of weights and of heads against the parameters themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fullrank.metrics as metrics
from fullrank.capture import Recorder, survey, undisturbed
from fullrank.capture.weights import per_head
from fullrank.measure.heads import HeadObserver
from fullrank.measure.summaries import row_scopes
from fullrank.measure.weights import weight_rows
from oracles import weights as naive

WIDTH, HEADS, INNER = 12, 3, 20


class Block(nn.Module):
    """Pre-norm, fused qkv, biased, with a gate on the heads' output where asked for."""

    def __init__(self, *, gated=False):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH) if gated else None

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        x = x + self.out(y)
        return x + self.down(functional.relu(self.up(self.norm_2(x))))


class Net(nn.Module):
    def __init__(self, blocks, vocabulary=30):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(*, gated=False, blocks=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(blocks or [Block(gated=gated) for _ in range(2)]).eval()


IDS = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))


def measured(model, **options):
    with undisturbed(model):
        anatomy = survey(model, lambda: model(IDS))
    rows = weight_rows(model, anatomy, **options)
    found = {(row.layer, row.part, row.head, row.metric): row for row in rows}
    assert len(found) == len(rows)
    return anatomy, found


@pytest.mark.parametrize("metric", ["weight_rms", "condensation", "spectral_norm", "weight_stable_rank"])
def test_every_role_has_the_number_of_its_rows_of_the_parameter(metric):
    model = net()
    _, rows = measured(model)
    for layer, block in enumerate(model.blocks, 1):
        q, k, v = block.qkv.weight.detach().chunk(3)
        own = {"q": q, "k": k, "v": v, "o": block.out.weight, "up": block.up.weight, "down": block.down.weight}
        for part, W in own.items():
            row = rows[layer, part, None, metric]
            assert row.value == pytest.approx(getattr(naive, metric)(W.detach()), rel=1e-5)
            assert (row.site, row.n, row.exact, row.note) == ("weights", 1, True, "")
    assert rows[0, "embed", None, metric].value == pytest.approx(getattr(naive, metric)(model.embed.weight.detach()))
    assert rows[2, "unembed", None, metric].value == pytest.approx(getattr(naive, metric)(model.head.weight.detach()))


def test_circuits_of_every_head_and_of_all_together():
    model = net()
    _, rows = measured(model)
    q, k, v = (W.view(HEADS, -1, WIDTH) for W in model.blocks[0].qkv.weight.detach().chunk(3))
    W_O = model.blocks[0].out.weight.detach()
    for h in range(HEADS):
        O_h = W_O[:, h * 4 : h * 4 + 4]
        variance = naive.qk_eigenvalue_variance(q[h], k[h])
        assert rows[1, "self", h, "qk_eigenvalue_variance"].value == pytest.approx(variance, rel=1e-5)
        assert rows[1, "self", h, "value_output_sign"].value == pytest.approx(naive.value_output_sign(v[h], O_h))
    together = naive.value_output_sign(v.reshape(-1, WIDTH), W_O)
    assert rows[1, "self", None, "value_output_sign"].value == pytest.approx(together)


def test_what_is_too_dear_is_drawn_or_left_out_and_says_so():
    _, rows = measured(net(), most_rows=25, widest=8)
    dear = rows[2, "unembed", None, "condensation"]
    assert not dear.exact
    assert dear.value == pytest.approx(naive.condensation(net().head.weight.detach()), rel=0.3)
    assert rows[1, "up", None, "condensation"].exact
    together = rows[1, "self", None, "value_output_sign"]
    assert together.value is None
    assert "wide" in together.note


def test_a_shared_block_has_the_same_numbers_in_both_layers():
    block = Block()
    _, rows = measured(net(blocks=[block, block]))
    for part in ("q", "down"):
        assert rows[1, part, None, "spectral_norm"].value == rows[2, part, None, "spectral_norm"].value


def test_measuring_changes_no_parameter_and_draws_nothing():
    model = net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    measured(model, most_rows=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_role_and_an_integer_weight_are_rows_with_their_reason():
    model = net()
    anatomy, _ = measured(model)
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(INNER, WIDTH, dtype=torch.int8), requires_grad=False)
    first = anatomy.stacks[0].weights[0]
    lost = tuple(dataclasses.replace(w, reason="it cannot be told") if w.role == "o" else w for w in first)
    stack = dataclasses.replace(anatomy.stacks[0], weights=(lost, anatomy.stacks[0].weights[1]))
    rows = weight_rows(model, dataclasses.replace(anatomy, stacks=(stack,)))
    reasons = {row.part: row.note for row in rows if row.value is None}
    assert reasons == {
        "up": "it is quantised to int8",
        "o": "it cannot be told",
        "self": "o: it cannot be told",
    }
    assert {row.metric for row in rows if row.part == "self" and row.value is None} == {"value_output_sign"}


def test_experts_are_one_part_with_their_mean_and_standard_error():
    case = build("mixtral")
    anatomy = survey(case.model, case.run)
    rows = {(row.layer, row.part, row.metric): row for row in weight_rows(case.model, anatomy)}
    experts = case.model.layers[0].mlp.experts
    gates = torch.tensor([naive.spectral_norm(W[:64].detach()) for W in experts.gate_up_proj], dtype=torch.float64)
    row = rows[1, "expert.gate", "spectral_norm"]
    assert (row.value, row.stderr) == pytest.approx((float(gates.mean()), float(gates.std() / 2)), rel=1e-6)
    assert row.n == len(gates) == 4


# ---------------------------------------------------------------- heads


def observed_rows(model, *, mask=None):
    with undisturbed(model):
        anatomy = survey(model, lambda: model(IDS))
        observer = HeadObserver(model, anatomy)
        with Recorder(model, [observer], anatomy=anatomy, real=mask):
            model(IDS)
    return observer.rows()


def observed(model, *, mask=None):
    rows = observed_rows(model, mask=mask)
    return {(row.layer, row.part, row.scope, row.metric): row for row in rows if row.head is None}


def contributions(block, x):
    """(sequences, heads, tokens, width): A V of every head through its columns of W_O."""
    B, T, _ = x.shape
    q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2) for part in block.qkv(block.norm_1(x)).chunk(3, -1))
    A = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
    return torch.einsum("bhtk,dhk->bhtd", A @ v, block.out.weight.view(WIDTH, HEADS, -1)).detach()


class Scopes:
    """Which rows each scope takes of every call."""

    needs = frozenset({"attention"})

    def __init__(self):
        self.seen = []

    def see(self, event):
        self.seen.append(row_scopes(event))


def test_head_similarity_is_that_of_the_contributions_themselves():
    model = net()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    scopes = Scopes()
    with undisturbed(model), Recorder(model, [scopes], real=mask):
        model(IDS)
    found = observed(model, mask=mask)
    rows = observed_rows(model, mask=mask)
    heads = {(row.layer, row.scope, row.metric, row.head): row for row in rows}
    x = model.embed(IDS)
    for layer, block in enumerate(model.blocks, 1):
        assert set(scopes.seen[layer - 1]) == {"all", "late"}
        for scope, taken in scopes.seen[layer - 1].items():
            expected = metrics.head_similarity(contributions(block, x).double(), taken)
            row = found[layer, "self", scope, "head_similarity"]
            assert (row.value, row.n) == (pytest.approx(float(expected.mean()), abs=1e-5), 2)
            nearest = metrics.nearest_head_similarity(contributions(block, x).double(), taken).mean(0)
            for head, value in enumerate(nearest.tolist()):
                row = heads[layer, scope, "nearest_head_similarity", head]
                assert (row.value, row.n) == (pytest.approx(value, abs=1e-5), 2)
        x = block(x)


def test_a_head_is_nearest_to_the_one_it_was_copied_from():
    model = net()
    with torch.no_grad():
        wide = WIDTH // HEADS
        for tensor in (model.blocks[1].qkv.weight, model.blocks[1].qkv.bias):
            for third in tensor.chunk(3):
                third[:wide] = third[-wide:]
        model.blocks[1].out.weight[:, :wide] = 0.5 * model.blocks[1].out.weight[:, -wide:]
    found = {(row.layer, row.metric, row.head): row.value for row in observed_rows(model) if row.scope == "all"}
    assert found[2, "nearest_head", 0] == HEADS - 1
    assert found[2, "nearest_head", HEADS - 1] == 0
    assert found[2, "nearest_head_similarity", 0] == pytest.approx(1, abs=1e-6)
    assert found[1, "nearest_head_similarity", 0] < 0.9


def test_a_square_invertible_projection_hides_nothing_and_one_without_rank_does():
    model = net()
    assert observed(model)[1, "self", "all", "head_ambiguity"].value == 0
    with torch.no_grad():
        model.blocks[0].out.weight[2:] = 0
    row = observed(model)[1, "self", "all", "head_ambiguity"]
    assert row.value == 9 * (WIDTH - 2)
    assert "condition number" in row.note


def test_heads_behind_a_gate_are_not_compared():
    found = observed(net(gated=True))
    assert {row.note for row in found.values()} == {
        "a gate or a norm lies between the kernel and W_O: what a head writes is more than A V W_O"
    }


# ---------------------------------------------------------------- cost


class Counting(TorchDispatchMode):
    """Shapes of what is decomposed, and of matrices that are multiplied in float64."""

    def __init__(self):
        super().__init__()
        self.decomposed, self.multiplied = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._linalg_svd.default:
            self.decomposed.append(tuple(args[0].shape))
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float64:
            self.multiplied.append((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


def test_of_an_output_projection_one_gram_matrix_is_made_for_a_call_and_one_decomposition():
    model = net()
    with undisturbed(model):
        anatomy = survey(model, lambda: model(IDS))
        observer = HeadObserver(model, anatomy)
        with Recorder(model, [observer], anatomy=anatomy), Counting() as counting:
            model(IDS)
    assert counting.multiplied == [((WIDTH, WIDTH), (WIDTH, WIDTH))] * 2  # two layers, of any number of sequences
    assert counting.decomposed == [(WIDTH, WIDTH)] * 2


def test_the_heads_of_a_weight_are_fetched_once_for_a_circuit(monkeypatch):
    fetched = []

    def fetch(model, weight):
        fetched.append(weight.role)
        return per_head(model, weight)

    monkeypatch.setattr("fullrank.measure.weights.per_head", fetch)
    measured(net())
    assert fetched == ["q", "k", "v", "o"] * 2


def test_a_circuit_that_does_not_lead_back_to_the_stream_is_a_row_with_its_reason():
    model = net()
    anatomy, _ = measured(model)
    narrow = tuple(
        dataclasses.replace(weight, columns=((0, 8, 1),)) if weight.role in "qv" else weight
        for weight in anatomy.stacks[0].weights[0]
    )
    stack = dataclasses.replace(anatomy.stacks[0], weights=(narrow, anatomy.stacks[0].weights[1]))
    rows = weight_rows(model, dataclasses.replace(anatomy, stacks=(stack,)))
    assert {(row.metric, row.note) for row in rows if row.value is None} == {
        ("qk_eigenvalue_variance", "its two weights do not lead from the stream back to it"),
        ("value_output_sign", "its two weights do not lead from the stream back to it"),
    }


def test_a_weight_is_found_without_a_walk_through_the_model(monkeypatch):
    model = net()
    anatomy, rows = measured(model)

    def walk(*args, **kwargs):
        raise AssertionError("every module was looked at")

    monkeypatch.setattr(nn.Module, "named_modules", walk)
    again = weight_rows(model, anatomy)
    assert len(again) == len(rows)
    assert all(row == rows[row.layer, row.part, row.head, row.metric] for row in again)
