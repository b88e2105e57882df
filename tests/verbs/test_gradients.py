"""One forward and its backwards against plain autograd; batches, halves, loss scales, frozen bases; no trace left."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fullrank.metrics as metrics
from fullrank.capture import survey, undisturbed
from fullrank.measure import GradientObserver, ParameterObserver
from fullrank.verbs.batches import as_calls
from fullrank.verbs.gradients import Backwards, Differentiated
from fullrank.verbs.passes import record


def gpt2(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"initializer_range": 0.3} | options))).eval()


def ids(sequences=4, tokens=8, seed=0):
    return torch.randint(50, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def labelled(x):
    return {"input_ids": x, "labels": x}


def back(model, calls, anatomy, observers, **options):
    """Every call forward and back; what was differentiated, and the notes."""
    backwards = Backwards(model, **options)
    notes = record(model, calls, anatomy, observers, lambda what, share: None, None, backwards)
    return backwards.about, notes


def look(model, batch, *, several=False, **options):
    """What the two observers make of a batch, or of several."""
    with undisturbed(model):
        calls = as_calls(model, batch)
        anatomy = survey(model, lambda: calls[0].run(model))
        observers = [
            GradientObserver(causal=[stack.name for stack in anatomy.stacks if stack.causal]),
            ParameterObserver(model, anatomy, several=several or len(calls) > 1),
        ]
        about, notes = back(model, calls, anatomy, observers, **options)
    return Table([row for observer in observers for row in observer.rows()], about, notes)


class Table:
    def __init__(self, rows, about, notes):
        self.rows, self.about, self.notes = rows, about, notes

    def row(self, metric, part, layer, head=None, scope="all", stack="decoder"):
        (found,) = [
            row
            for row in self.rows
            if (row.metric, row.part, row.layer, row.head, row.scope, row.stack)
            == (metric, part, layer, head, scope, stack)
        ]
        return found

    def value(self, *place, **more):
        return self.row(*place, **more).value

    def values(self):
        return {row.key: row.value for row in self.rows}


def plain(model, x):
    """Gradients of (loss · sequences) on a copy: of the states and of the parameters."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    states = []
    twin.transformer.h[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    for block in twin.transformer.h:
        block.register_forward_hook(lambda m, a, out: states.append(out if torch.is_tensor(out) else out[0]))
    loss = twin(**labelled(x)).loss * len(x)
    for state in states:
        state.retain_grad()
    loss.backward()
    return [state.grad for state in states], {name: p.grad / len(x) for name, p in twin.named_parameters()}


def test_numbers_of_the_own_loss_equal_plain_autograd():
    model, x = gpt2(), ids()
    seen = look(model, labelled(x))
    assert seen.about == Differentiated("loss")
    assert str(seen.about) == "the model's own loss"
    states, parameters = plain(model, x)
    for layer, G in enumerate(states):
        per_sequence = G.square().mean((1, 2)).sqrt()
        row = seen.row("gradient_rms", "out", layer)
        assert row.value == pytest.approx(float(per_sequence.mean()), rel=1e-5)
        assert row.stderr == pytest.approx(float(per_sequence.std() / 2), rel=1e-4)
        assert (row.n, row.exact) == (4, True)
        late = G[:, 4:].square().mean((1, 2)).sqrt().mean()
        assert seen.value("gradient_rms", "out", layer, scope="late") == pytest.approx(float(late), rel=1e-5)
        gain = G.flatten(1).norm(dim=1) / states[-1].flatten(1).norm(dim=1)
        assert seen.value("gradient_gain", "out", layer) == pytest.approx(float(gain.mean()), rel=1e-5)
    exponent = (2 * (states[0].flatten(1).norm(dim=1) / states[-1].flatten(1).norm(dim=1)).log() / 2).mean()
    assert seen.value("gradient_exponent", "out", 2) == pytest.approx(float(exponent), rel=1e-5)
    for name, G in parameters.items():
        layer = int(name.split(".")[2]) + 1 if ".h." in name else 0
        assert seen.value("gradient_norm", name, layer) == pytest.approx(float(G.norm()), rel=1e-5)


def test_numbers_by_role_are_those_of_slices_of_the_fused_weight():
    model, x = gpt2(), ids()
    seen = look(model, labelled(x))
    _, parameters = plain(model, x)
    for layer in (1, 2):
        block = model.transformer.h[layer - 1]
        fused, G = block.attn.c_attn.weight.detach(), parameters[f"transformer.h.{layer - 1}.attn.c_attn.weight"]
        weights = {role: (fused[:, i * 16 : i * 16 + 16], G[:, i * 16 : i * 16 + 16]) for i, role in enumerate("qkv")}
        weights["o"] = block.attn.c_proj.weight.detach(), parameters[f"transformer.h.{layer - 1}.attn.c_proj.weight"]
        weights["up"] = block.mlp.c_fc.weight.detach(), parameters[f"transformer.h.{layer - 1}.mlp.c_fc.weight"]
        weights["down"] = block.mlp.c_proj.weight.detach(), parameters[f"transformer.h.{layer - 1}.mlp.c_proj.weight"]
        e = {role: W.norm() * G.norm() for role, (W, G) in weights.items()}
        for role, value in e.items():
            assert seen.value("elasticity", role, layer) == pytest.approx(float(value), rel=1e-5)
        ratio = math.hypot(e["q"], e["k"]) / math.hypot(e["v"], e["o"])
        assert seen.value("elasticity_ratio", "self", layer) == pytest.approx(ratio, rel=1e-5)
        pooled = metrics.query_key_to_value_output(*(weights[role][1] for role in "qkvo"))
        assert seen.value("query_key_to_value_output", "self", layer) == pytest.approx(float(pooled), rel=1e-5)
    inside = {name: G for name, G in parameters.items() if ".h." in name}
    norms = torch.stack([G.norm() for G in inside.values()])
    gini = metrics.gradient_heterogeneity(norms, torch.tensor([G.numel() for G in inside.values()]))
    assert seen.value("gradient_heterogeneity", "all", 2) == pytest.approx(float(gini), rel=1e-5)


def test_a_tied_weight_has_one_row_with_the_gradient_of_both_its_uses():
    model, x = gpt2(), ids()
    assert model.lm_head.weight is model.transformer.wte.weight
    seen = look(model, labelled(x))
    _, parameters = plain(model, x)
    norm = float(parameters["transformer.wte.weight"].norm())
    assert seen.value("gradient_norm", "transformer.wte.weight", 0) == pytest.approx(norm, rel=1e-5)
    assert not any(row.part == "lm_head.weight" for row in seen.rows)


@pytest.mark.parametrize("loss", [True, False])
def test_a_batch_and_its_halves_give_the_same_numbers(loss):
    model, x = gpt2(), ids(6)
    form = labelled if loss else (lambda part: {"input_ids": part})
    whole = look(model, form(x), several=True, probes=2).values()
    halves = look(model, [form(x[:3]), form(x[3:])], probes=2).values()
    assert whole.keys() == halves.keys()
    for key, value in whole.items():
        if not loss and key[-1] in (
            "gradient_norm",
            "elasticity",
            "elasticity_ratio",
            "query_key_to_value_output",
            "gradient_heterogeneity",
        ):
            continue  # squares of sums of independent projections against sums of squares: the same in expectation
        assert halves[key] == pytest.approx(value, rel=2e-5, abs=1e-7), key


def test_merging_observers_is_looking_at_both_batches():
    model, x = gpt2(), ids(6)
    with undisturbed(model):
        calls = as_calls(model, [labelled(x[:2]), labelled(x[2:])])
        anatomy = survey(model, lambda: calls[0].run(model))

        def observers():
            return [GradientObserver(causal=["decoder"]), ParameterObserver(model, anatomy, several=True)]

        together, one, other = observers(), observers(), observers()
        back(model, calls, anatomy, together)
        back(model, calls[:1], anatomy, one)
        back(model, calls[1:], anatomy, other)
    for mine, theirs, both in zip(one, other, together, strict=True):
        mine.merge(theirs)
        for found, expected in zip(mine.rows(), both.rows(), strict=True):
            assert found.key == expected.key
            assert found.value == pytest.approx(expected.value, rel=1e-6)


class Scaled(nn.Module):
    """The same model under a loss scale."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, input_ids, labels):
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss * self.scale}


RATIOS = (
    "gradient_gain",
    "gradient_exponent",
    "elasticity_ratio",
    "query_key_to_value_output",
    "gradient_heterogeneity",
    "angle_exponent",
)


def test_ratios_are_the_same_under_a_loss_scale_and_sizes_are_scaled():
    x = ids()
    plain_loss, scaled = (look(Scaled(gpt2(), scale), labelled(x)) for scale in (1.0, 1024.0))
    compared = set()
    for one, other in zip(plain_loss.rows, scaled.rows, strict=True):
        assert one.key == other.key
        assert (one.value is None) == (other.value is None), one
        if one.value is None:
            continue
        compared.add(one.metric)
        scale = 1 if one.metric in RATIOS else 1024
        assert one.value * scale == pytest.approx(other.value, rel=1e-6), one
    assert compared > set(RATIOS)


def test_nothing_is_left_and_nothing_is_disturbed():
    model, x = gpt2(), ids()
    model.transformer.h[0].requires_grad_(False)
    model(**labelled(x)).loss.backward()  # a gradient that waits for its step
    flags = [p.requires_grad for p in model.parameters()]
    pending = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in pending]
    before = model(x).logits
    random = torch.get_rng_state()
    look(model, labelled(x))
    look(model, {"input_ids": x}, probes=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in model.parameters()] == flags
    for parameter, gradient, value in zip(model.parameters(), pending, values, strict=True):
        assert parameter.grad is gradient
        assert value is None or torch.equal(gradient, value)
        assert not parameter._backward_hooks
    assert torch.equal(model(x).logits, before)


def test_hooks_that_a_user_runs_when_gradients_have_been_accumulated_are_not_called():
    model, x = gpt2(), ids()
    called = []
    handles = [p.register_post_accumulate_grad_hook(lambda p: called.append(p)) for p in model.parameters()]
    look(model, labelled(x))
    assert not called
    for handle in handles:
        handle.remove()


def frozen_base():
    """A base that is frozen and a low-rank path beside its attention, as adapters have it."""
    model = gpt2()
    model.requires_grad_(False)
    projection = model.transformer.h[1].attn.c_proj

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(1)
    model.transformer.h[1].attn.c_proj = Adapted(projection)
    return model


def test_a_frozen_base_has_its_gradients_too():
    x = ids()
    model, awake = frozen_base(), frozen_base().requires_grad_()
    seen, expected = look(model, labelled(x)), look(awake, labelled(x))
    assert seen.values() == expected.values()
    assert all(row.value is not None for row in seen.rows if row.metric == "gradient_norm")
    assert sum(p.requires_grad for p in model.parameters()) == 2


def test_a_model_that_is_frozen_as_a_whole_has_gradients():
    model, x = gpt2().requires_grad_(False), ids()
    assert look(model, labelled(x)).values() == look(gpt2(), labelled(x)).values()
    assert look(model, {"input_ids": x}, probes=1).value("gradient_gain", "out", 0) > 0


def test_grouped_queries_have_rows_of_the_right_heads():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    seen = look(LlamaForCausalLM(config).eval(), labelled(ids()))
    heads = {
        which: [row.head for row in seen.rows if row.part == f"self.{which}" and row.scope == "all"]
        for which in ("q", "k", "v", "output")
    }
    assert heads == {"q": [0, 1, 2, 3], "k": [0, 1], "v": [0, 1], "output": [0, 1, 2, 3]}


# ------------------------------------------------------------ projections


class Tiny(nn.Module):
    """Two blocks on a stream of three tokens of width four: small enough for its whole Jacobian."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(TinyBlock() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class TinyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


def tiny():
    torch.manual_seed(0)
    model = Tiny().double().eval()
    for block in model.blocks:
        for linear in (block.q, block.k, block.v, block.o):
            nn.init.normal_(linear.weight, std=0.8)
    return model


def test_projections_estimate_the_frobenius_norm_of_the_whole_jacobian():
    model, x = tiny(), torch.tensor([[1, 5, 3]])
    W = model.blocks[0].v.weight

    def last(weight):
        return torch.func.functional_call(model, {"blocks.0.v.weight": weight}, (x,))

    exact = float(torch.autograd.functional.jacobian(last, W.detach()).norm())
    seen = look(model, x, probes=200)
    row = seen.row("gradient_norm", "blocks.0.v.weight", 1, stack="encoder")
    assert not row.exact
    assert abs(row.value - exact) < 4 * row.stderr
    assert row.stderr < 0.1 * exact
    first = model.embed(x).detach()

    def run(state):
        for block in model.blocks:
            state = block(state)
        return state

    jacobian = float(torch.autograd.functional.jacobian(run, first).norm())
    row = seen.row("gradient_rms", "out", 0, stack="encoder")
    assert abs(row.value * math.sqrt(12) - jacobian) < 4 * row.stderr * math.sqrt(12)
    assert seen.value("gradient_rms", "out", 2, stack="encoder") == pytest.approx(1, abs=0.1)
    assert str(seen.about) == "200 random projections of the last stream state of encoder"


def test_the_squares_of_projections_are_unbiased():
    """Many estimates with one probe each: their mean of squares is the squared norm, within its own standard error."""
    model, x = tiny(), torch.tensor([[1, 5, 3]])
    W = model.blocks[1].q.weight.detach()

    def last(weight):
        return torch.func.functional_call(model, {"blocks.1.q.weight": weight}, (x,))

    exact = float(torch.autograd.functional.jacobian(last, W).square().sum())
    squares = torch.tensor(
        [
            look(model, x, probes=1, seed=seed).value("gradient_norm", "blocks.1.q.weight", 2, stack="encoder") ** 2
            for seed in range(60)
        ]
    )
    assert abs(float(squares.mean()) - exact) < 4 * float(squares.std()) / math.sqrt(60)


def test_the_standard_error_of_one_sequence_is_over_probes():
    model = gpt2()
    one = look(model, {"input_ids": ids(1)}, probes=6).row("gradient_rms", "out", 0)
    assert one.n == 1
    assert one.stderr > 0
    assert look(model, {"input_ids": ids(1)}, probes=1).row("gradient_rms", "out", 0).stderr is None


def test_padding_is_not_projected_and_not_counted():
    model = gpt2()
    x = ids(2)
    mask = torch.ones_like(x)
    mask[1, 5:] = 0
    garbled = x.clone()
    garbled[1, 5:] = 7
    seen, other = (look(model, {"input_ids": y, "attention_mask": mask}, probes=2) for y in (x, garbled))
    for row in seen.rows:
        if row.part == "out" and row.metric.startswith("gradient"):
            assert other.value(row.metric, row.part, row.layer, scope=row.scope) == pytest.approx(row.value, rel=1e-5)


def test_what_does_not_enter_is_said_so():
    model = gpt2(tie_word_embeddings=False)
    projected = look(model, {"input_ids": ids()}, probes=1).row("gradient_norm", "lm_head.weight", 0)
    assert projected.value is None
    assert "does not enter 1 random projections" in projected.note
    model.unused = nn.Linear(3, 3)
    loss = look(model, labelled(ids())).row("gradient_norm", "unused.weight", 0)
    assert (loss.value, loss.exact) == (0.0, True)
    assert "does not enter the model's own loss" in loss.note


def test_integer_parameters_have_the_reason():
    model = gpt2()
    model.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    row = look(model, labelled(ids())).row("gradient_norm", "codes", 0)
    assert (row.value, row.note) == (None, "it is quantised: int8 has no gradients")
    assert not model.codes.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_are_added_up_in_full(dtype):
    model, x = gpt2().to(dtype), ids()
    seen = look(model, labelled(x))
    states, parameters = plain(model, x)
    for layer, G in enumerate(states):
        exact = G.double().square().mean((1, 2)).sqrt().mean()
        assert seen.value("gradient_rms", "out", layer) == pytest.approx(float(exact), rel=1e-5)
    name = "transformer.h.0.mlp.c_fc.weight"
    again = {key: g * len(x) for key, g in parameters.items()}  # a power of two: exact
    assert seen.value("gradient_norm", name, 1) == pytest.approx(float(again[name].double().norm()) / len(x), rel=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = tiny(), reentrant

    def forward(self, ids):
        x = self.inner.embed(ids)
        for block in self.inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_a_checkpointed_model_has_the_numbers_of_the_plain_one():
    x = torch.tensor([[1, 5, 3], [2, 2, 8]])
    model = Checkpointed(False)
    seen, expected = look(model, x, probes=2), look(model.inner, x, probes=2)
    for row in expected.rows:
        part = f"inner.{row.part}" if row.metric == "gradient_norm" else row.part
        found = seen.row(row.metric, part, row.layer, row.head, row.scope, stack="encoder")
        assert found.value == pytest.approx(row.value, rel=1e-9, abs=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the survey runs without gradients
def test_reentrant_checkpoints_are_answered_with_the_reason():
    seen = look(Checkpointed(True), torch.tensor([[1, 5, 3], [2, 2, 8]]))
    assert seen.about.of == "nothing"
    gradients = [row for row in seen.rows if row.metric in ("gradient_rms", "gradient_gain")]
    assert gradients
    assert all(row.value is None and "checkpoint" in row.note for row in gradients)
    assert any("no gradients" in note and "checkpoint" in note for note in seen.notes)

    class WithLoss(Checkpointed):
        def forward(self, ids):
            return super().forward(ids).square().mean()

    seen = look(WithLoss(True), torch.tensor([[1, 5, 3], [2, 2, 8]]))
    assert seen.about.of == "nothing"
    assert any("the model's backward failed" in note and "checkpoint" in note for note in seen.notes)


def test_a_model_whose_backward_fails_says_what_it_says():
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("this kernel has no backward")

    class Model(Tiny):
        def forward(self, ids):
            x = self.embed(ids)
            return self.blocks[1](Refuses.apply(self.blocks[0](x)))

    seen = look(Model().eval(), torch.tensor([[1, 5, 3]]))
    assert any("this kernel has no backward" in note for note in seen.notes)
    assert seen.row("gradient_rms", "out", 0, stack="encoder").value is None


def test_an_observer_s_own_fault_is_not_taken_for_the_model_s():
    class Broken(GradientObserver):
        def see(self, event):
            raise RuntimeError("an observer of ours is broken")

    model = tiny()
    x = torch.tensor([[1, 5, 3]])
    with undisturbed(model):
        anatomy = survey(model, lambda: model(x))
        observer = Broken()
        observer.needs = frozenset({"gradient"})
        with pytest.raises(RuntimeError, match="an observer of ours is broken"):
            back(model, as_calls(model, x), anatomy, [observer])


def test_each_gradient_is_dropped_before_the_next_one_comes():
    """What is handed on is not held: of all gradients at most a few are alive at any time."""
    import weakref

    from fullrank.capture import ParameterGradient

    alive, most = [], []

    class Count:
        needs = frozenset({"gradient"})

        def see(self, event):
            if isinstance(event, ParameterGradient) and event.value is not None:
                alive.append(weakref.ref(event.value))
                most.append(sum(ref() is not None for ref in alive))

        def rows(self):
            return []

        def merge(self, other):
            raise AssertionError("nothing is merged here")

    model, x = gpt2(n_layer=4), ids()
    with undisturbed(model):
        calls = as_calls(model, labelled(x))
        back(model, calls, survey(model, lambda: calls[0].run(model)), [Count()])
    assert len(alive) > 40
    assert max(most) <= 2


def test_gradients_of_heads_equal_plain_autograd():
    model = tiny()
    x = torch.tensor([[1, 5, 3], [2, 2, 8]])

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids).square().mean()

    seen = look(WithLoss().eval(), x)
    block, state = model.blocks[0], model.embed(x).detach().requires_grad_()
    q, k, v = (m(state).unflatten(-1, (2, 2)).transpose(1, 2) for m in (block.q, block.k, block.v))
    y = (q @ k.mT / math.sqrt(2)).softmax(-1) @ v
    out = model.blocks[1](state + block.o(y.transpose(1, 2).flatten(2)))
    gradients = torch.autograd.grad(out.square().mean() * 2, (q, k, v, y))
    for which, G in zip(("q", "k", "v", "output"), gradients, strict=True):
        for head in (0, 1):
            expected = G[:, head].square().mean((1, 2)).sqrt()
            found = seen.row("gradient_rms", f"self.{which}", 1, head, stack="encoder")
            assert_close(torch.tensor(found.value, dtype=torch.float64), expected.mean(), rtol=1e-6, atol=1e-9)
