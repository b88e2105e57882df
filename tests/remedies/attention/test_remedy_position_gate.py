"""Gates against their formula on dense maps, what they cost, and what they undo of uniform attention."""

import kinds
import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from carrying import check_decoding
from remedy_patients import build
from torch import nn
from torch.nn import functional

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden

PHI = {
    "double-sigmoid": lambda z: 2 / (1 + torch.exp(-z)),
    "one-plus-tanh": lambda z: 1 + torch.tanh(z),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
}


@pytest.mark.parametrize("kind", ["head-wise", "element-wise"])
@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_multiplied_by_what_their_token_says(mask, kind):
    check(mask, kind, "double-sigmoid", True)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("bias", [True, False])
def test_other_gates(phi, bias):
    check("causal", "head-wise", phi, bias)


def check(mask, kind, phi, bias):
    case = MASKS[mask]()
    with repaired_and_seen(case, "position-gate", kind=kind, phi=phi, bias=bias) as (_, calls):
        gates = [m for n, m in case.model.named_modules() if n.endswith("fullrank_position_gate_after")]
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(gates)
        for call, gate in zip(seen, gates, strict=True):
            heads = call.output.shape[1]
            z = torch.einsum("bti,oi->bto", call.input, gate.weight.detach().double())
            z = z + gate.bias.detach().double() if bias else z
            assert (gate.bias is not None) == bias
            g = PHI[phi](z).reshape(*z.shape[:2], heads, -1)
            expected = torch.einsum("bhtc,bthc->bhtc", call.A @ call.v, g.expand(*g.shape[:3], call.v.shape[-1]))
            rows = real_rows(case, call)
            near = max(tolerance(mask), 1e-10)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=near)


@pytest.mark.parametrize("phi", ["double-sigmoid", "one-plus-tanh"])
@pytest.mark.parametrize("kind", ["head-wise", "element-wise"])
def test_it_begins_as_the_identity_bit_for_bit(phi, kind):
    case = build("gpt2")
    with torch.no_grad():
        before = case()
        with fullrank.repair(case.model, "position-gate", batch=case.batch, phi=phi, kind=kind):
            assert torch.equal(case(), before)


def test_a_plain_sigmoid_begins_at_a_half():
    case = MASKS["full"]()
    with repaired_and_seen(case, "position-gate", stirred=False, phi="sigmoid") as (_, calls):
        for call in calls():
            torch.testing.assert_close(call.output, 0.5 * call.A @ call.v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_what_it_costs_beside_the_output_projection(bias):
    """Head-wise 1/d_k of it, with a bias beside one with a bias; element-wise as much as all of it."""
    config = TransformerConfig(kind="encoder", depth=1, width=768, heads=12, mlp_width=0, biases=bias)
    model = Transformer(config, seed=0).eval()
    batch = {"input_ids": torch.arange(4)[None]}
    projection = sum(p.numel() for p in model.blocks[0].attention.inner.output.parameters())
    with fullrank.repair(model, "position-gate", batch=batch, bias=bias) as repair:
        assert_golden("hc-gate-overhead", repair.parameters / projection)
    with fullrank.repair(model, "position-gate", batch=batch, bias=bias, kind="element-wise") as repair:
        assert repair.parameters == projection


def test_decoding_with_a_cache():
    kind = kinds.build("llama")

    def prepare():
        repair = fullrank.repair(kind.model, "position-gate", batch=kind.batch)
        with torch.no_grad():
            for name, parameter in kind.model.named_parameters():
                if "fullrank_position_gate" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        return repair

    check_decoding(kind.model, prepare)


@pytest.mark.parametrize(("kind", "rank"), [("head-wise", 4), ("element-wise", 32)])
def test_what_uniform_attention_returns_has_rank_one_and_with_gates_that_of_its_gates(kind, rank):
    """A = U gives every token the same; gates that read the token give each head's share a weight of its own."""
    config = TransformerConfig(
        kind="encoder", depth=1, width=32, heads=4, mlp_width=0, qk_std=0.0, biases=False, placement="none", norm="none"
    )
    model = Transformer(config, seed=0).double().eval()
    x = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def wrote():
        with torch.no_grad():
            return torch.linalg.matrix_rank(model.blocks[0].attention(x)[0], rtol=1e-8).item()

    assert wrote() == 1
    with fullrank.repair(model, "position-gate", batch={"inputs_embeds": x}, kind=kind):
        assert wrote() == 1
        gate = model.blocks[0].attention.inner.fullrank_position_gate_after
        with torch.no_grad():
            gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        assert wrote() == rank


def test_a_module_that_is_given_no_tokens_is_refused():
    class Kernel(nn.Module):
        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.kernel, self.out = nn.Linear(8, 24), Kernel(), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
            return x + self.out(self.kernel(q, k, v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(RemedyError, match="position-gate"):
        fullrank.repair(Model(), "position-gate", batch={"x": torch.randn(1, 5, 8)})


def test_parameters():
    case = build("gpt2")
    for wrong in ("kind=token-wise", "phi=relu", "bias=2"):
        with pytest.raises(RemedyError, match=wrong.partition("=")[0]):
            fullrank.repair(case.model, f"position-gate?{wrong}", batch=case.batch)
