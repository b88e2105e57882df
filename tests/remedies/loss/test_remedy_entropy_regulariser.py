"""The entropy regulariser against its definition on dense maps; how it reaches the loss; what it does to heads."""

import copy
import pickle

import kinds
import pytest
import torch
import transformers as hf
from attending import MASKS, repaired_and_seen
from remedy_patients import build, stir

import fullrank
from fullrank.capture import survey
from fullrank.edit import rewrite_attention
from fullrank.errors import RemedyError
from fullrank.remedies import penalty_of
from fullrank.remedies.attention import scores as scores_module
from golden import assert_golden


def _expected(case, calls, *, weight, margin, theta, rows=None):
    """λ · mean over calls and heads of δ² 1(|δ| > γ L), by a loop over queries."""
    terms = []
    for place, call in enumerate([c for c in calls if c.part == "self"]):
        heads = []
        for h in range(call.s.shape[1]):
            E, L = [], []
            for b in range(call.s.shape[0]):
                real = call.visible[b, h].any(0) if call.visible.shape[-2] == call.visible.shape[-1] else None
                for t in range(call.s.shape[2]) if rows is None else rows:
                    n = int(call.visible[b, h, t].sum())
                    if n < 2 or (real is not None and not real[t]):
                        continue
                    a = call.A[b, h, t][call.visible[b, h, t]]
                    E.append(-(a * a.log()).sum())
                    L.append(torch.tensor(float(n)).double().log())
            mean_L = torch.stack(L).mean()
            wanted = theta if isinstance(theta, float) else theta[4 * place + h]
            delta = torch.stack(E).mean() - wanted * mean_L
            heads.append(delta**2 if abs(delta) > margin * mean_L else torch.zeros(()).double())
        terms.append(torch.stack(heads).mean())
    return weight * torch.stack(terms).mean()


@pytest.mark.parametrize(
    "settings", [{"theta": 0.9, "margin": 0.02}, {"theta": 0.3, "rows": 3, "weight": 2.0}], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
def test_the_penalty_is_that_of_the_dense_maps(mask, settings):
    case = MASKS[mask]()
    with repaired_and_seen(case, "entropy-regulariser", **settings) as (repair, calls):
        case()
        found = repair.penalty().detach().double()
        given = {"weight": 0.164, "margin": 0.2} | settings
        if "rows" in given:
            queries = calls()[0].s.shape[2]
            given["rows"] = torch.linspace(queries - 1, 0, 3).round().long().tolist()
        if mask == "biased" and "rows" in given:
            return  # its two stacks have other numbers of queries
        torch.testing.assert_close(found, _expected(case, calls(), **given), rtol=1e-5, atol=1e-7)


def test_each_head_has_a_theta_of_its_own_and_is_trained_by_it():
    case = MASKS["causal"]()
    with repaired_and_seen(case, "entropy-regulariser", learnable=True, margin=0.05) as (repair, calls):
        case()
        theta, found = case.model.fullrank_entropy_regulariser.theta, repair.penalty().detach().double()
        expected = _expected(case, calls(), weight=0.164, margin=0.05, theta=theta.detach())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_without_gradients_nothing_is_collected_and_old_terms_are_forgotten():
    case = build("llama_padded")
    with fullrank.repair(case.model, "entropy-regulariser", theta=1.0, margin=0.0, batch=case.batch):
        assert float(penalty_of(case.model).detach()) == 0
        case()
        assert float(penalty_of(case.model).detach()) > 0
        twin = pickle.loads(pickle.dumps(copy.deepcopy(case.model)))
        assert float(penalty_of(twin).detach()) == 0
        case.answer(twin)
        torch.testing.assert_close(penalty_of(twin), penalty_of(case.model))
        with torch.no_grad():
            case()
        assert float(penalty_of(case.model).detach()) == 0


def _language_model(**options):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**kinds.TEXT, num_key_value_heads=2, **options)
    model = hf.LlamaForCausalLM(config).double()
    stir(list(model.parameters()))
    ids = kinds.ids()
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def test_it_is_added_to_the_loss_in_training_alone():
    with torch.random.fork_rng():
        model, batch = _language_model()
    plain = model.eval()(**batch).loss
    with fullrank.repair(model, "entropy-regulariser", theta=1.0, margin=0.0, weight=3.0, batch=batch) as repair:
        torch.testing.assert_close(model.eval()(**batch).loss, plain, rtol=0, atol=0)
        trained = model.train()(**batch).loss
        torch.testing.assert_close(
            trained, plain + model.fullrank_entropy_regulariser.value().float(), rtol=1e-6, atol=0
        )
        assert float(repair.penalty()) == 0  # the loss has it
        assert float(trained.detach()) > float(plain.detach()) + 1e-3
    torch.testing.assert_close(model.train()(**batch).loss, plain, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_under_checkpointing_it_counts_once_and_has_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        with torch.random.fork_rng():
            model, batch = _language_model()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fullrank.repair(model, "entropy-regulariser", theta=1.0, margin=0.0, weight=3.0, batch=batch)
        model.train()
        loss = model(**batch).loss
        before = float(model.fullrank_entropy_regulariser.value().detach())
        assert before > 0
        loss.backward()
        assert float(model.fullrank_entropy_regulariser.value().detach()) == before
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_blocks_of_queries_give_the_same_term_and_gradients(monkeypatch):
    from fullrank.remedies.loss import entropy_regulariser as module

    whole, found = scores_module.row_blocks, []
    for entries in (1 << 25, 120):
        monkeypatch.setattr(module, "row_blocks", lambda call, e=entries: whole(call, e))
        case = build("llama_padded")
        fullrank.repair(case.model, "entropy-regulariser", theta=1.0, margin=0.0, batch=case.batch)
        case()
        term = penalty_of(case.model)
        term.backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in case.model.parameters()]
        found.append([term.detach(), *grads])
    assert any(float(grad.abs().max()) > 0 for grad in found[0][1:])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_golden_default_weight_is_the_released_one_for_means():
    assert_golden("en-regulariser-scale", fullrank.remedies.CATALOGUE["entropy-regulariser"].parameters[0].default)


def test_for_heads_that_collapsed_training_brings_their_entropy_back():
    """Queries and keys grown until rows are sharp; 120 steps of theirs on the penalty alone; θ = .6, γ = .1."""
    case = MASKS["causal"]()
    with torch.no_grad():
        for n, p in case.model.named_parameters():
            if "q_proj" in n or "k_proj" in n:
                p.mul_(2)
    with repaired_and_seen(case, "entropy-regulariser", theta=0.6, margin=0.1, weight=1.0) as (repair, calls):

        def normalised():
            found = []
            for call in calls():
                H = -torch.special.xlogy(call.A, call.A).sum(-1)[..., 1:]
                found.append(H.mean((0, 2)) / call.visible.sum(-1)[..., 1:].double().log().mean((0, 2)))
            return torch.cat(found)

        before = normalised()
        assert float(before.max()) < 0.26
        mine = [p for n, p in case.model.named_parameters() if "q_proj" in n or "k_proj" in n]
        optimiser = torch.optim.Adam(mine, lr=5e-3)
        for _ in range(120):
            optimiser.zero_grad()
            case()
            repair.penalty().backward()
            optimiser.step()
        assert float(normalised().min()) > 0.38


ENTROPY = "entropy-regulariser?theta=0&margin=0&weight=1"
OTHERS = {
    "temperature?kind=fixed&scale=3&learnable=false": {"scale": 3.0},
    "hopfield?average=0.5": {"average": 0.5},
    "local-mask?window=2": {"window": 2},
}


def _dense_penalty(*, scale=1.0, average=0.0, window=None):
    """Mean over layers and heads of E² of a llama without remedies; outputs of attention are put in layer by layer."""
    kind = kinds.build("llama")
    model, scores = kind.model, []

    def look(call):
        K = call.key.repeat_interleave(2, 1)
        scores.append((call.query @ K.mT * call.query.shape[-1] ** -0.5).detach())
        return call

    anatomy = kind.anatomy()
    found, h = [], torch.zeros(())
    for layer in (1, 2, 3):  # what a layer reads is what the layers before it made
        with rewrite_attention(model, anatomy, before=look, layer=layer), torch.no_grad():
            scores.clear()
            kind()
        h = average * h + (1 - average) * scale * scores[0]
        s = h
        T = s.shape[-1]
        hidden = torch.tensor([[k > t or (window is not None and t - k >= window) for k in range(T)] for t in range(T)])
        A = torch.softmax(s.masked_fill(hidden, float("-inf")), -1)
        E = -torch.special.xlogy(A, A).sum(-1)[..., 1:].mean((0, 2))
        found.append((E**2).mean())

        def put_in(call, output, A=A):
            return A @ call.value.repeat_interleave(2, 1)

        rewrite_attention(model, anatomy, after=put_in, layer=layer)
    return torch.stack(found).mean()


@pytest.mark.parametrize("name", ["llama", "llama_eager"])
@pytest.mark.parametrize("other", OTHERS)
def test_it_is_of_the_map_that_other_remedies_make_whichever_came_first(name, other):
    expected = _dense_penalty(**OTHERS[other])
    assert abs(float(expected - _dense_penalty())) > 0.01
    for order in ([ENTROPY, other], [other, ENTROPY]):
        kind = kinds.build(name)
        fullrank.repair(kind.model, order, batch=kind.batch)
        kind()
        found = kind.model.fullrank_entropy_regulariser.value().detach().double()
        atol = 1e-5 if name == "llama_eager" else 1e-9  # it softmaxes in float32
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_a_map_that_is_put_in_counts_by_the_shares_of_its_rows():
    case = MASKS["causal, explicit softmax"]()
    maps = []
    with torch.no_grad():
        anatomy = survey(case.model, case)
    for order in (["softpick", ENTROPY], [ENTROPY, "softpick"]):
        with fullrank.repair(case.model, order, batch=case.batch):
            look = lambda call, output: [maps.append(call.weights), output][1]  # noqa: E731
            with rewrite_attention(case.model, anatomy, after=look):
                maps.clear()
                case()
            terms = []
            for A in maps:
                A = A.detach().double()
                E = torch.zeros(A.shape[:-1]).double()
                for place in torch.cartesian_prod(*(torch.arange(n) for n in A.shape[:-1])):
                    row = A[tuple(place)]
                    shares = row[row > 0] / row.sum().clamp(min=1e-300)
                    E[tuple(place)] = -(shares * shares.log()).sum()
                terms.append((E[..., 1:].mean((0, 2)) ** 2).mean())
            found = case.model.fullrank_entropy_regulariser.value()
            torch.testing.assert_close(found.detach().double(), torch.stack(terms).mean(), rtol=1e-6, atol=0)
            found.backward()
            grads = [p.grad for p in case.model.parameters() if p.grad is not None]
            assert all(bool(torch.isfinite(grad).all()) for grad in grads)
            assert any(float(grad.abs().max()) > 0 for grad in grads)
            case.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("order", [["softcap?cap=1", ENTROPY], [ENTROPY, "softcap?cap=1"]])
def test_a_kernel_that_another_remedy_replaced_is_refused_and_its_own_softmax_is_seen(order):
    kind = kinds.build("llama")
    with pytest.raises(RemedyError, match="entropy-regulariser needs the map of a softmax"):
        fullrank.repair(kind.model, order, batch=kind.batch)
    values = []
    for cap in ("softcap?cap=1", "softcap?cap=1e6"):
        kind = kinds.build("llama_eager")
        fullrank.repair(kind.model, [cap if one.startswith("softcap") else one for one in order], batch=kind.batch)
        kind()
        values.append(float(kind.model.fullrank_entropy_regulariser.value().detach()))
    assert values[0] > values[1] + 0.05  # capped scores are flatter
