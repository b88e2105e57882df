"""σReparam: the function stays, the spectral norm is a number, growing weights change nothing, and it folds."""

import kinds
import pytest
import torch
from matrices import NAMES, matrices

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.weights.sigma_reparam import SigmaReparam

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(autouse=True)
def reference_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def functions(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, SigmaReparam)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per", ["parameter", pytest.param("role", marks=pytest.mark.slow)])
@torch.no_grad()
def test_gamma_is_the_spectral_norm_and_the_size_of_the_parameter_changes_nothing(name, per):
    kind = kinds.build(name)
    before, answer = matrices(name, kind.model), kind()
    packed = {"gpt2": 3, "plain": 3, "torch_encoder": 3}.get(name, 1)
    with fullrank.repair(kind.model, "sigma-reparam", per=per, batch=kind.batch):
        torch.testing.assert_close(kind(), answer, rtol=0, atol=1e-13)
        found = sorted(gamma for one in functions(kind.model).values() for gamma in one.gamma.flatten().tolist())
        if per == "parameter" and packed == 3:
            layers = range(1, 4)
            whole = [
                torch.cat([before["encoder" if name == "torch_encoder" else "decoder", n, r] for r in "qkv"])
                for n in layers
            ]
            rest = [W for (_, _, role), W in before.items() if role not in "qkv"]
        else:
            whole, rest = [], list(before.values())
        norms = sorted(float(torch.linalg.svdvals(W)[0]) for W in (*whole, *rest))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-4, atol=0)
        for parameter in [p for n, p in kind.model.named_parameters() if n.endswith(".original")]:
            parameter.mul_(7)
        torch.testing.assert_close(kind(), answer, rtol=0, atol=1e-11)
        for one in functions(kind.model).values():
            one.gamma.fill_(2.0)
        effective = matrices(name, kind.model)
        for (stack, layer, role), W in effective.items():
            if packed == 3 and per == "parameter" and role in "qkv":
                W = torch.cat([effective[stack, layer, each] for each in "qkv"])
            assert float(torch.linalg.svdvals(W)[0]) == pytest.approx(2, rel=1e-4)


def test_one_step_of_power_iteration_per_use_in_training_and_none_in_evaluation():
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    one = SigmaReparam(V, order=(0, 1), experts=False, rows=1, parts=[range(6)], generator=generator)
    V2 = V + 0.5 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    u = one.u[0].clone()
    one.eval()
    one(V2)
    assert torch.equal(one.u[0], u)
    one.train()
    for _ in range(3):
        v = V2.T @ u / (V2.T @ u).norm()
        u = V2 @ v / (V2 @ v).norm()
        W = one(V2)
        torch.testing.assert_close(one.u[0], u, rtol=0, atol=1e-12)
        torch.testing.assert_close(W, one.gamma[0, 0] * V2 / (u @ V2 @ v), rtol=0, atol=1e-12)


def test_the_gradient_goes_through_sigma_with_u_and_v_held_fixed():
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    G = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    one = SigmaReparam(V, order=(0, 1), experts=False, rows=1, parts=[range(5)], generator=generator).eval()
    P = V.clone().requires_grad_()
    (one(P) * G).sum().backward()
    u, s, v = torch.linalg.svd(V)
    sigma, outer = s[0], torch.outer(u[:, 0], v[0])
    # W = γV/σ, dσ = uvᵀ, γ = σ
    torch.testing.assert_close(P.grad, G - (G * V).sum() / sigma * outer, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.gamma.grad[0, 0], (G * V).sum() / sigma, rtol=1e-5, atol=0)


def test_parts_and_experts_have_norms_of_their_own_and_other_rows_stay():
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)  # experts, in, out
    one = SigmaReparam(V, order=(0, 2, 1), experts=True, rows=1, parts=[[0, 1], [4, 5]], generator=generator).eval()
    assert one.gamma.shape == (3, 2)
    with torch.no_grad():
        one.gamma.fill_(1.0)
        W = one(V)
    for e in range(3):
        for rows in ([0, 1], [4, 5]):
            norm = torch.linalg.svdvals(V[e][:, rows])[0]
            torch.testing.assert_close(W[e][:, rows], V[e][:, rows] / norm, rtol=1e-5, atol=0)
        assert torch.equal(W[e][:, 2:4], V[e][:, 2:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_function_stays_bit_for_bit_in_every_precision(dtype):
    kind = kinds.build("gpt2")
    kind.model.to(dtype)
    before = kind()
    with fullrank.repair(kind.model, "sigma-reparam", batch=kind.batch):
        assert torch.equal(kind(), before)


def test_after_training_the_weight_takes_the_effective_value():
    kind = kinds.build("torch_encoder")
    repair = fullrank.repair(kind.model, "sigma-reparam", batch=kind.batch)
    kind.model.train()
    optimizer = torch.optim.SGD(kind.model.parameters(), lr=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(2):
            optimizer.zero_grad()
            kind().square().mean().backward()
            optimizer.step()
    kind.model.eval()
    with torch.no_grad():
        trained = kind()
        said = repair.undo()
        torch.testing.assert_close(kind(), trained, rtol=0, atol=1e-12)
    assert said.endswith("keeps its trained weights.")  # γ is in them: nothing is gone
    assert not functions(kind.model)


def test_it_compiles_into_one_graph_and_trains_under_autocast():
    kind = kinds.build("gpt2")
    kind.model.float()
    with fullrank.repair(kind.model, "sigma-reparam", roles="mlp", batch=kind.batch):
        block = kind.model.h[0].mlp
        for one in functions(block).values():
            one.train()  # and not its dropout
        X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        state = {n: b.clone() for n, b in block.named_buffers()}
        eager = block(X)
        for n, b in block.named_buffers():
            b.copy_(state[n])
        compiled = torch.compile(block, backend="eager", fullgraph=True)(X)
        torch.testing.assert_close(compiled, eager)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block(X).float().sum().backward()
        gamma = next(p for n, p in block.named_parameters() if n.endswith("gamma"))
        assert gamma.dtype == torch.float32
        assert gamma.grad.abs().max() > 0


def test_a_weight_of_zeros_is_refused_and_nothing_changes():
    kind = kinds.build("bert")
    with torch.no_grad():
        kind.model.encoder.layer[2].output.dense.weight.zero_()
    names = list(kind.model.state_dict())
    with pytest.raises(RemedyError, match=r"layer\.2\.output\.dense\.weight .* its spectral norm is 0"):
        fullrank.repair(kind.model, "sigma-reparam", batch=kind.batch)
    assert list(kind.model.state_dict()) == names


@torch.no_grad()
def test_entropy_does_not_collapse_where_queries_and_keys_grow():
    """Weights that training makes 12 times as large, in every layer: maps freeze without it, and stay with it."""

    def entropy(kind):
        rows = fullrank.examine(kind.model, kind.batch, spectrum=False).rows
        found = [row.value for row in rows if row.metric == "normalized_entropy" and row.scope == "all"]
        return sum(found) / len(found)

    kind = kinds.build("bert")
    start = entropy(kind)
    with fullrank.repair(kind.model, "sigma-reparam", batch=kind.batch):
        for name, p in kind.model.named_parameters():
            if ("query" in name or "key" in name) and name.endswith("original"):
                p.mul_(12)
        assert entropy(kind) == pytest.approx(start, rel=1e-6)
    kind = kinds.build("bert")
    for name, p in kind.model.named_parameters():
        if ("query" in name or "key" in name) and name.endswith("weight"):
            p.mul_(12)
    assert entropy(kind) < 0.5 * start
