"""A report made on a GPU is the one made on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import fullrank
from alike import differences
from fullrank.capture import AttentionCall, Recorder, survey
from fullrank.operators import AttentionOperator, Causal, Padding
from fullrank.operators.spectra import attention_spectra

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
COUNTS = {  # whole numbers: in another order of sums, what is close to a threshold may fall on its other side
    *("numerical_rank", "centered_numerical_rank", "soft_rank", "centered_soft_rank"),
    *("distinct_at_dtype", "neighbourhood_overlap", "sink_position", "max_abs_position"),
}


@pytest.fixture(autouse=True)
def whole_float32():
    """Matrix products in float32, not in TF32: then both devices round alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=96, initializer_range=0.3)
        return GPT2Model(config).eval()


def values(report, *sites):
    """What both devices must agree on: standard errors are differences of near numbers, of which little is left."""
    rows = (row for row in report.rows if not sites or row.site in sites)
    return {row.key: (row.value, None, row.n, row.exact) for row in rows}


def said(report):
    """What comes with the values."""
    return {row.key: (row.n, row.exact, row.note, row.value is None) for row in report.rows}


@pytest.mark.parametrize("padded", [False, True])
def test_a_report_made_on_a_gpu_is_the_one_made_on_the_cpu(padded):
    model = gpt2()
    ids = torch.randint(64, (4, 80), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    if padded:
        batch["attention_mask"] = (torch.arange(80) < torch.tensor([[80], [33], [61], [50]])).long()
    cpu, gpu = fullrank.examine(model, batch), fullrank.examine(copy.deepcopy(model).to(DEVICE), batch)
    assert gpu.about["device"].startswith(DEVICE)
    assert said(gpu) == said(cpu)
    assert not differences(values(gpu), values(cpu), tolerance=1e-3, absolute=1e-5, but=COUNTS)


def test_the_model_stays_on_its_gpu_and_its_random_state_as_it_was():
    model = gpt2().cuda()
    before = torch.cuda.get_rng_state()
    fullrank.examine(model, {"input_ids": torch.arange(48).reshape(2, 24)})
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.fixture
def maps(generator):
    """The same attention on both devices: grouped queries, causal, padded."""
    q = 1.5 * torch.randn(2, 4, 96, 16, generator=generator)
    k = torch.randn(2, 2, 96, 16, generator=generator)
    real = torch.arange(96) < torch.tensor([[96], [71]])
    return real, *(
        AttentionOperator(q.to(device), k.to(device), mask=Causal() & Padding(real.to(device)))
        for device in ("cpu", DEVICE)
    )


def test_a_summary_on_a_gpu_is_that_on_the_cpu(maps):
    _, cpu, gpu = maps
    ours, theirs = cpu.summary(), gpu.summary()
    for name in ("entropy", "inverse_participation", "max_logit", "logit_std", "visible", "column_mean"):
        value = getattr(theirs, name)
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), getattr(ours, name), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_spectra_on_a_gpu_are_those_on_the_cpu(maps):
    real, cpu, gpu = maps
    ours = attention_spectra(cpu, rows=real, columns=real)
    theirs = attention_spectra(gpu, rows=real.cuda(), columns=real.cuda())
    for name in ("s", "uniform_distance", "smoothing_gain"):
        value = getattr(theirs, name)
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), getattr(ours, name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_gradients_on_a_gpu_are_those_on_the_cpu(labels):
    model = gpt2_with_a_head()
    ids = torch.randint(64, (3, 48), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids} | ({"labels": ids} if labels else {})
    cpu, gpu = (
        values(
            fullrank.examine(copy.deepcopy(model).to(device), batch, gradients=True, probes=2, spectrum=False),
            "gradient",
        )
        for device in ("cpu", DEVICE)
    )
    assert not differences(gpu, cpu, tolerance=1e-3, absolute=1e-6)
    assert sum(value is not None for value, *_ in cpu.values()) > 80


def gpt2_with_a_head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 96}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()


class Layer(nn.Module):
    """A pre-norm layer of causal attention and an MLP, which keeps what the kernel returned where asked to."""

    def __init__(self, heads, width):
        super().__init__()
        d = heads * width
        self.norm, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads, self.returned = heads, None

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.returned is not None:
            self.returned.append(y.detach().clone())
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_2(x))))


def layers(count, heads, width):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(heads, width) for _ in range(count))).eval().to(DEVICE)


class Products:
    """A V and A |V| of every call, as they are read."""

    needs = frozenset({"attention"})

    def __init__(self):
        self.seen = []

    def see(self, event):
        assert isinstance(event, AttentionCall)
        A, V = event.attention, event.value
        self.seen.append((event.kernel, A.matmat(V).double(), A.matmat(V.abs()).double()))


# A kernel in half precision rounds each exponential before the product and what it returns after it; scores and sums
# are float32. In float32 the scores, of sizes up to some ten, are themselves off by as many roundings.
KERNELS = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 2),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.float32, 64),
    "math": (SDPBackend.MATH, torch.float32, 64),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_product_of_every_call_is_what_the_fused_kernel_returned(name):
    backend, dtype, roundings = KERNELS[name]
    model = layers(2, 4, 64)
    with torch.no_grad():
        for layer in model:
            layer.qkv.weight.normal_(0, 0.08, generator=torch.Generator(DEVICE).manual_seed(2))  # far from uniform
    model = model.to(dtype)
    x = torch.randn(2, 300, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    products = Products()
    with torch.no_grad(), sdpa_kernel(backend):
        anatomy = survey(model, lambda: model(x))
        for layer in model:
            layer.returned = []
        with Recorder(model, [products], anatomy=anatomy):
            model(x)
    returned = [y.double() for layer in model for y in layer.returned]
    assert [kernel for kernel, *_ in products.seen] == ["scaled_dot_product_attention"] * 2
    for (_, recomputed, size), y in zip(products.seen, returned, strict=True):
        assert bool(((recomputed - y).abs() <= roundings * torch.finfo(dtype).eps * size).all())
        assert float(y[..., -1, :].std()) > 0.1 * float(y[..., 0, :].std())  # no mean of 300 values


TOKENS, LIMIT = 131_072, 8 * 2**30
"""What the layer's own activations and a few blocks of scores fit in; a map of one head has 64 GiB."""


@pytest.mark.parametrize("options", [{"spectrum": False}, {"heads": ["1.0"]}], ids=["no spectra", "one head"])
def test_memory_of_a_long_context_is_linear_and_far_below_a_map(options):
    peaks = []
    model = layers(1, 8, 64)
    for tokens in (TOKENS // 2, TOKENS):
        x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        report = fullrank.examine(model, x, **options)
        peaks.append(torch.cuda.max_memory_allocated())
        assert any(row.value is not None for row in report.rows.where(metric="entropy").rows)
        spectral = report.rows.where(metric="attention_s2").rows
        assert [row.head for row in spectral if row.value is not None] == ([0] if "heads" in options else [])
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < LIMIT
