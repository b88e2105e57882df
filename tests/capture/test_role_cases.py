"""Roles where names would not help: plain torch, adapters, parametrisations, packed and offloaded weights."""

from __future__ import annotations

import copy
import warnings

import accelerate
import peft
import pytest
import torch
from families import build, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import sharp
from torch import nn
from torch.nn import functional

from fullrank.capture import survey, undisturbed
from fullrank.capture.weights import Weight, indices, matrix, per_head, runs, unreadable
from fullrank.errors import CaptureError


def states():
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


def roles(model, *args, layer=1, stack=0, **kwargs):
    with undisturbed(model):
        anatomy = survey(model, lambda: model(*args, **kwargs))
    return {weight.part: weight for weight in anatomy.stacks[stack].weights[layer - 1]}


class Block(nn.Module):
    """Pre-norm attention and an MLP of one's own choice."""

    def __init__(self, mlp, width=16, heads=2):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.heads = mlp, heads

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.a(self.first(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.b(y.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.second(x))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def two(mlp):
    return sharp(Net(*(Block(mlp()) for _ in range(2))))


@given(st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=60, deadline=None)
def test_runs_give_back_the_numbers_in_their_order(numbers):
    assert indices(runs(numbers)) == numbers


def test_nn_transformer_encoder_has_the_rows_of_its_packed_projection():
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    model = sharp(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    found = roles(model, states())
    assert {part: (w.parameter, w.rows) for part, w in found.items()} == {
        "q": ("layers.0.self_attn.in_proj_weight", ((0, 16, 1),)),
        "k": ("layers.0.self_attn.in_proj_weight", ((16, 32, 1),)),
        "v": ("layers.0.self_attn.in_proj_weight", ((32, 48, 1),)),
        "o": ("layers.0.self_attn.out_proj.weight", None),
        "up": ("layers.0.linear1.weight", None),
        "down": ("layers.0.linear2.weight", None),
    }
    assert found["k"].heads[1] == ((20, 24, 1),)
    assert found["o"].heads[3] == ((12, 16, 1),)


def test_nn_transformer_decoder_reads_its_memory_through_other_rows():
    layer = nn.TransformerDecoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    model = sharp(nn.TransformerDecoder(layer, 2))
    found = roles(model, states(), states() + 1, layer=2)
    for role, start in (("q", 0), ("k", 16), ("v", 32)):
        assert found[role].parameter == "layers.1.self_attn.in_proj_weight"
        assert found[f"cross.{role}"].parameter == "layers.1.multihead_attn.in_proj_weight"
        assert found[role].rows == found[f"cross.{role}"].rows == ((start, start + 16, 1),)
    assert found["cross.o"].parameter == "layers.1.multihead_attn.out_proj.weight"


class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x):
        return self.two(functional.glu(self.one(x)))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.two = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.two(self.one(x) * self.other(x))


def test_the_second_half_of_glu_is_the_gate():
    found = roles(two(GLU), states())
    assert (found["up"].rows, found["gate"].rows) == (((0, 24, 1),), ((24, 48, 1),))
    assert found["up"].parameter == found["gate"].parameter == "blocks.0.mlp.one.weight"


def test_of_two_linear_factors_none_is_called_the_gate():
    found = roles(two(Bilinear), states())
    assert found["down"].parameter == "blocks.0.mlp.two.weight"
    assert found["up"].reason == found["gate"].reason != ""
    assert found["up"].parameter == ""


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def test_a_block_without_output_projection_has_none_rather_than_the_next_weight():
    class Bare(Block):
        def __init__(self):
            super().__init__(mlp())
            self.b = nn.Identity()

    found = roles(sharp(Net(Bare(), Bare())), states())
    assert found["o"].reason == "no product with a weight reads what the kernel returned"
    assert found["up"].parameter == "blocks.0.mlp.0.weight"


def test_queries_that_are_the_stream_itself_have_no_weight():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Linear(16, 16)

        def forward(self, x):
            return x + functional.scaled_dot_product_attention(x, x, self.values(x))

    found = roles(sharp(Net(Bare(), Bare())), states())
    assert found["q"].reason == found["k"].reason != ""
    assert found["v"].parameter == "blocks.0.values.weight"


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_parametrised_weight_is_what_the_module_uses(kind):
    model = two(mlp)
    for block in model.blocks:
        getattr(nn.utils.parametrizations, kind)(block.a)
    model.eval()
    found = roles(model, states())
    assert found["k"].parameter == "blocks.0.a.weight"
    assert found["k"].rows == ((16, 32, 1),)
    assert torch.equal(matrix(model, found["k"]), model.blocks[0].a.weight[16:32])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_stand_beside_the_base_weight():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(build("llama").model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = roles(model, input_ids=ids(), use_cache=False)
    prefix = "base_model.model.layers.0."
    for role, place in (
        ("q", "self_attn.q"),
        ("v", "self_attn.v"),
        ("o", "self_attn.o"),
        ("up", "mlp.up"),
        ("down", "mlp.down"),
    ):
        assert found[role].parameter == f"{prefix}{place}_proj.base_layer.weight"
        both = {f"{prefix}{place}_proj.lora_{factor}.default.weight" for factor in "AB"}
        assert set(found[role].beside) == both
    assert found["k"].parameter == f"{prefix}self_attn.k_proj.weight"
    assert found["k"].beside == found["gate"].beside == ()


def test_a_quantised_weight_has_its_role_and_a_reason():
    model = two(mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        found = roles(packed, states())
    assert set(found) == {"q", "k", "v", "o", "up", "down"}
    for weight in found.values():
        assert "packed" in weight.reason
    assert found["q"].parameter == "blocks.0.a"
    with pytest.raises(CaptureError, match="packed"):
        matrix(packed, found["q"])


def test_a_weight_of_integers_is_not_read_as_a_matrix():
    class Integer(nn.Linear):
        def __init__(self):
            super().__init__(16, 16, bias=False)
            self.weight = nn.Parameter(torch.randint(-9, 9, (16, 16), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return functional.linear(x, self.weight.to(x.dtype) * 0.05)

    model = two(mlp)
    for block in model.blocks:
        block.b = Integer()
    found = roles(model, states())
    assert found["o"].parameter == "blocks.0.b.weight"
    assert "quantised" in unreadable(model, found["o"])
    with pytest.raises(CaptureError, match="int"):
        per_head(model, found["o"])


def test_offloaded_weights_have_roles_and_are_fetched():
    model = two(mlp)
    expected = roles(model, states())
    whole = {part: matrix(model, weight).clone() for part, weight in expected.items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].a.weight.is_meta
    found = roles(model, states())
    assert found == expected
    for part, weight in found.items():
        assert torch.equal(matrix(model, weight), whole[part])
    assert model.blocks[0].a.weight.is_meta


def test_a_weight_that_is_gone_is_a_reason():
    assert "any more" in unreadable(nn.Linear(2, 2), Weight("q", parameter="other.weight"))


class Beside(Block):
    """Given something narrower before its stream, from which its cross-attention has keys and values."""

    def __init__(self, width=16, heads=2):
        super().__init__(nn.Linear(width, width), width, heads)
        self.of_queries = nn.Linear(width, width)
        self.of_keys, self.of_values = nn.Linear(width // 2, width), nn.Linear(width // 2, width)

    def forward(self, other, x):
        B, T, d = x.shape
        q = self.of_queries(self.first(x))
        k, v = self.of_keys(other), self.of_values(other)
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.b(y.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.second(x))


def test_roles_of_blocks_whose_stream_is_not_the_first_tensor():
    class Chain(Net):
        def forward(self, x):
            other = x.flip(0)[..., :8]
            for block in self.blocks:
                x = block(other, x)
            return x

    model, x = sharp(Chain(Beside(), Beside(), Beside())), states()
    with undisturbed(model):
        (stack,) = survey(model, lambda: model(x)).stacks
    assert stack.at == 1
    for layer, weights in enumerate(stack.weights):
        found = {weight.role: (weight.parameter, weight.direct) for weight in weights}
        names = {"q": "of_queries", "k": "of_keys", "v": "of_values", "o": "b"}
        for role, name in names.items():
            assert found[role] == (f"blocks.{layer}.{name}.weight", True), role


class Ellipses(Block):
    """Attention by einsums that do not spell their leading axes out."""

    def forward(self, x):
        q, k, v = self.a(self.first(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        p = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
        x = x + self.b(torch.einsum("...hqk,...khd->...qhd", p, v).flatten(-2))
        return x + self.mlp(self.second(x))


def test_an_ellipsis_hides_no_role():
    model = sharp(Net(*(Ellipses(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))) for _ in range(2))))
    twin = sharp(Net(*(Block(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))) for _ in range(2))))
    for role, weight in roles(twin, states()).items():
        found = roles(model, states())[role]
        assert (found.parameter, found.rows, found.heads) == (weight.parameter, weight.rows, weight.heads), role
