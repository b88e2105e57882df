"""A report made on a GPU is the one made on the CPU."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import fullrank
from fullrank.operators import AttentionOperator, Causal, Padding
from fullrank.operators.spectra import attention_spectra

pytestmark = pytest.mark.gpu

COUNTS = {  # whole numbers: in another order of sums, what is close to a threshold may fall on its other side
    *("numerical_rank", "centered_numerical_rank", "soft_rank", "centered_soft_rank"),
    *("distinct_at_dtype", "neighbourhood_overlap", "sink_position"),
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


def keyed(report):
    return {(row.stack, row.layer, row.site, row.part, row.metric, row.head, row.scope): row for row in report.rows}


@pytest.mark.parametrize("padded", [False, True])
def test_a_report_made_on_a_gpu_is_the_one_made_on_the_cpu(padded):
    model = gpt2()
    ids = torch.randint(64, (4, 80), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    if padded:
        batch["attention_mask"] = (torch.arange(80) < torch.tensor([[80], [33], [61], [50]])).long()
    cpu = keyed(fullrank.examine(model, batch))
    report = fullrank.examine(copy.deepcopy(model).cuda(), batch)
    assert report.about["device"].startswith("cuda")
    gpu = keyed(report)
    assert gpu.keys() == cpu.keys()
    for key, row in cpu.items():
        assert (gpu[key].n, gpu[key].exact, gpu[key].note) == (row.n, row.exact, row.note), key
        assert (gpu[key].value is None) == (row.value is None), key
        if row.value is not None and key[4] not in COUNTS:
            assert gpu[key].value == pytest.approx(row.value, rel=1e-3, abs=1e-5), key


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
        for device in ("cpu", "cuda")
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
        keyed(fullrank.examine(copy.deepcopy(model).to(device), batch, gradients=True, probes=2, spectrum=False))
        for device in ("cpu", "cuda")
    )
    assert gpu.keys() == cpu.keys()
    compared = 0
    for key, row in cpu.items():
        if key[2] == "gradient" and row.value is not None:
            assert gpu[key].value == pytest.approx(row.value, rel=1e-3, abs=1e-6), key
            compared += 1
    assert compared > 80


def gpt2_with_a_head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 96}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
