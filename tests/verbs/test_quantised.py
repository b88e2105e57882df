"""Quantised models: activations and attention are measured, weights are not, and both are said."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaModel

import fullrank
from alike import differences
from fullrank.capture import undisturbed
from fullrank.capture.recorder import Recorder
from untouched import changes, everything

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


IDS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    sizes["initializer_range"] = 0.3  # so that attention is not uniform
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


class Linear8bit(nn.Module):
    """Rows of int8 with a scale each, multiplied out in the forward: as bitsandbytes' `Linear8bitLt` holds them."""

    def __init__(self, plain):
        super().__init__()
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Linear4bit(nn.Module):
    """Blocks of numbers, two in a byte, in a flat parameter: as bitsandbytes' `Linear4bit` holds them."""

    def __init__(self, plain):
        super().__init__()
        self.shape = plain.weight.shape
        blocks = plain.weight.detach().reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        codes = ((blocks / scale).round() + 8).to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter((codes[:, :1] << 4 | codes[:, 1:]).contiguous(), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        codes = torch.cat([self.weight >> 4, self.weight & 15], 1).reshape(-1, 32)
        return linear(x, ((codes.to(x.dtype) - 8) * self.scale.to(x.dtype)).reshape(self.shape))


class Rows(torch.Tensor):
    """A tensor of a library's own class that answers a product and refuses all else, as those of torchao do."""

    @staticmethod
    def __new__(cls, codes, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight = args[:2]
            return linear(x, weight.codes.to(x.dtype) * weight.scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Rows(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of Rows")


def in_a_class_of_its_own(plain):
    scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
    plain.weight = nn.Parameter(Rows((plain.weight.detach() / scale).round().to(torch.int8), scale), False)
    return plain


def replaced(model, make):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
    return model


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is going out of use, and still in use
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


WAYS = {
    "packed": (dynamic, "14 modules are packed"),
    "8 bits": (lambda model: replaced(model, Linear8bit), "14 weights as int8"),
    "4 bits": (lambda model: replaced(model, Linear4bit), "14 weights as uint8"),
    "own class": (lambda model: replaced(model, in_a_class_of_its_own), "14 weights as Rows"),
}


def dequantised(model):
    """The plain model with the weights that a quantised one multiplies by."""
    plain = llama()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                quantised = model.get_submodule(name)
                packed = hasattr(quantised, "_packed_params")  # a product with it would round what it is given, too
                W = quantised.weight().dequantize() if packed else quantised(torch.eye(module.in_features)).T
                module.weight.copy_(W)
    return plain


def state(model):
    """With the numbers of weights that are no plain tensors."""
    stored = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if callable(weight):
            stored.append(weight().int_repr().clone())
        elif type(weight) is Rows:
            stored += [weight.codes.clone(), weight.scale.clone()]
    return everything(model) | {"stored": stored}


class Keep:
    needs = frozenset({"stream", "attention"})

    def __init__(self):
        self.states, self.maps = {}, []

    def see(self, event):
        if hasattr(event, "attention"):
            self.maps.append(event.attention.dense())
        elif event.part == "out":
            self.states[event.layer] = event.value.clone()


@pytest.mark.parametrize("name", WAYS)
def test_states_are_those_of_plain_hooks_and_maps_of_the_quantised_products(name):
    model = WAYS[name][0](llama())
    keep, expected = Keep(), []
    with undisturbed(model):
        handles = [block.register_forward_hook(lambda m, args, out: expected.append(out)) for block in model.layers]
        before = model(IDS, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        with Recorder(model, [keep]):
            during = model(IDS, use_cache=False).last_hidden_state
        model.set_attn_implementation("eager")
        maps = model(IDS, use_cache=False, output_attentions=True).attentions
    assert torch.equal(before, during)
    assert [torch.equal(keep.states[layer + 1], one) for layer, one in enumerate(expected)] == [True, True]
    for mine, theirs in zip(keep.maps, maps, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_weights_have_no_rows_but_a_reason_and_stay_as_they_are(name):
    quantise, said = WAYS[name]
    model = quantise(llama())
    before = state(model)
    report = examine(model, IDS, weights=True, spectrum=False)
    assert not changes(before, state(model))
    assert any(note.startswith("quantised:") and said in note for note in report.about["notes"])
    assert report.about["dtype"] == "float32"
    of_weights = [row for row in report.rows if row.site == "weights" and row.layer > 0]
    assert of_weights
    for row in of_weights:
        assert row.value is None
        assert row.note


@pytest.mark.parametrize("name", WAYS)
def test_rows_are_those_of_the_weights_that_are_multiplied_by(name):
    model = WAYS[name][0](llama())
    report, twin, plain = (examine(one, IDS, spectrum=False) for one in (model, dequantised(model), llama()))
    entropy = [row.value for row in twin.rows.where(metric="normalized_entropy", scope="all").rows]
    assert min(entropy) < 0.8  # attention is far from uniform
    assert differences(report, plain, tolerance=1e-3)
    if name != "packed":
        assert not differences(report, twin, tolerance=1e-4)
        return
    # every product rounds what it is given to 8 bits
    theirs = {row.key: row.value for row in twin.rows}
    for metric in ("similarity", "residual", "normalized_entropy", "sink_mass"):
        rows = report.rows.where(metric=metric).rows
        assert rows
        for row in rows:
            assert row.value == pytest.approx(theirs[row.key], abs=0.03), row


def test_a_model_of_plain_weights_is_not_called_quantised():
    assert not any("quantised" in note for note in examine(llama(), IDS, spectrum=False).about["notes"])
