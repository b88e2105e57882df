"""What every remedy bears of what trainers do: checkpointing, autocast, half precision, optimisers, compilers."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
from refusals import REFUSED
from remedy_patients import build, patients_of, stir
from safetensors.torch import load_model
from torch import Tensor, nn

import fullrank
from fullrank.edit.forwards import Enclosed
from fullrank.edit.registered import Added
from fullrank.edit.weights import _Parametrized, _Values
from fullrank.errors import RemedyError
from fullrank.remedies import CATALOGUE, penalty_of, repairs_in
from fullrank.verbs.save_repaired import save_repaired
from untouched import changes, everything


def patient_of(remedy):
    """The first model that it fits."""
    return next(one for one in patients_of(CATALOGUE[remedy].acts_on) if (remedy, one) not in REFUSED)


ONE_STEP_FURTHER = ("sigma-reparam",)
"""A repeated block takes a step of power iteration in training, and says so in its limits: not trained here."""

CHECKPOINTED = [one for one in CATALOGUE if patient_of(one) not in ("zoo_state_space",)]
"""The others have no switch for it."""


@pytest.fixture(autouse=True)
def reference_path():
    """`nn.TransformerEncoder` without its fused inference path, which an edit switches off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def repaired(remedy, *, dtype=torch.float64, size=0.3):
    """A model with the remedy, what was added stirred; it is taken out in any case."""
    case = build(patient_of(remedy))
    case.model.to(dtype)
    case.batch = {name: _as(value, dtype) for name, value in case.batch.items()}
    known = {id(p) for p in case.model.parameters()}
    repair = fullrank.repair(case.model, remedy, batch=case.batch)
    added = {name: p for name, p in case.model.named_parameters() if id(p) not in known}
    assert sum(p.numel() for p in added.values()) == repair.parameters
    stir(added, size)
    try:
        yield case, added
    finally:
        repair.undo()


def _as(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def loss(case):
    """A linear function of the output, so that no entry of it is without weight, and what remedies add."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = case()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return (out * probe).mean() + penalty_of(case.model)


def gradients(case):
    case.model.zero_grad(set_to_none=True)
    loss(case).backward()
    return {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attn_dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("remedy", CHECKPOINTED)
def test_repeated_blocks_give_the_same_gradients(remedy):
    with repaired(remedy) as (case, _):
        model = case.model
        without_dropout(model)
        model.train()
        if remedy in ONE_STEP_FURTHER:
            for module in model.modules():
                if hasattr(module, "gamma"):
                    module.eval()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        plain = gradients(case)
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is about to get another name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = gradients(case)
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=1e-10, msg=lambda said, name=name: name + said
            )


@pytest.mark.parametrize(
    "remedy",
    [pytest.param(one, marks=[] if CATALOGUE[one].acts_on == "attention" else [pytest.mark.slow]) for one in CATALOGUE],
)
def test_autocast_trains_what_was_added_and_the_result_is_saved(remedy, tmp_path):
    with repaired(remedy, dtype=torch.float32, size=0.1) as (case, added):
        model = case.model
        fresh = copy.deepcopy(build(patient_of(remedy)).model).float()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        model.train()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(case)
            assert torch.isfinite(value)
            optimiser.zero_grad()
            value.backward()
            for name, p in model.named_parameters():
                if name in added or p.grad is not None:
                    assert p.grad.dtype == torch.float32, name
                    assert torch.isfinite(p.grad).all(), name
            optimiser.step()
        model.eval()
        for name in added:
            assert not torch.equal(dict(model.named_parameters())[name], before[name]), name
        _check_reloaded(remedy, case, fresh, tmp_path)


def _check_reloaded(remedy, case, fresh, directory):
    """As trainers save, loaded into a plain model of other weights."""
    stir(list(fresh.parameters()))
    structural = any(one["structural"] for one in repairs_in(case.model))
    save_repaired(case.model, directory / "saved")
    if structural:
        loaded = fullrank.load_repaired(fresh, directory / "saved", batch=case.batch)
    else:
        loaded = contextlib.nullcontext()
        load_model(fresh, directory / "saved" / "model.safetensors")
    with torch.no_grad(), loaded:
        torch.testing.assert_close(case.answer(fresh), case(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("remedy", CATALOGUE)
def test_a_model_in_half_precision_gets_parameters_of_its_kind(remedy):
    with repaired(remedy, dtype=torch.bfloat16, size=0.1) as (case, added):
        assert {p.dtype for p in added.values()} <= {torch.bfloat16}
        with torch.no_grad():
            out = case()
        assert out.dtype == torch.bfloat16
        assert torch.isfinite(out).all()
        case.model.train()
        for name, gradient in gradients(case).items():
            assert torch.isfinite(gradient).all(), name
        case.model.eval()


class StopError(Exception):
    pass


def _failing_at(monkeypatch, number):
    """Whatever is changed n-th on a model fails; gives the count."""
    count = [0]

    def failing(init):
        def begin(self, *args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise StopError
            init(self, *args, **kwargs)

        return begin

    for kind in (Enclosed, Added, _Values, _Parametrized):
        monkeypatch.setattr(kind, "__init__", failing(kind.__init__))
    return count


def _check_failing(remedy, monkeypatch, number):
    case = build(patient_of(remedy))
    with torch.no_grad():
        case()  # what a first forward leaves in a process
    state = everything(case.model)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        _failing_at(patch, number)
        fullrank.repair(case.model, remedy, batch=case.batch)
    gc.collect()
    weights = ("versions",) if CATALOGUE[remedy].acts_on in ("weights", "residual") else ()
    assert [what for what in changes(state, everything(case.model)) if what not in weights] == []


def _changes_made(remedy):
    """How many; the repaired model is dropped, and freed."""
    case = build(patient_of(remedy))
    left = weakref.ref(case.model)
    with pytest.MonkeyPatch.context() as patch:
        count = _failing_at(patch, -1)
        fullrank.repair(case.model, remedy, batch=case.batch)
    del case
    gc.collect()
    assert left() is None
    return count[0]


SOME = ["attn-scale", "scaled-init", "sigma-reparam", "batch-norm", "value-residual", "reduce-tokens"]
"""Of each way to change a model one; the slow test has all."""


@pytest.mark.parametrize("remedy", SOME)
def test_what_fails_in_its_last_change_leaves_no_trace_and_a_dropped_model_is_freed(remedy, monkeypatch):
    _check_failing(remedy, monkeypatch, _changes_made(remedy))


@pytest.mark.slow
@pytest.mark.parametrize("remedy", CATALOGUE)
def test_what_fails_anywhere_leaves_no_trace(remedy, monkeypatch):
    number = _changes_made(remedy)
    for each in sorted(
        {1, 2, 3, 4, number // 4, number // 2, 3 * number // 4, number - 1, number} & set(range(1, number + 1))
    ):
        _check_failing(remedy, monkeypatch, each)


SEVERAL_GRAPHS: dict[str, str] = {}
"""Remedies of which compilers make no single graph, and why."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the tracer's
@pytest.mark.parametrize("remedy", [one for one in CATALOGUE if one not in SEVERAL_GRAPHS])
def test_a_compiled_model_follows_in_one_graph(remedy):
    gc.collect()  # models of other tests that use the table of attention functions
    torch._dynamo.reset()
    case = build(patient_of(remedy))
    compiled = torch.compile(lambda **batch: case.model(**batch), backend="eager", fullgraph=True)

    def run():
        output = compiled(**case.batch)
        return output if isinstance(output, Tensor) else output[0]

    with torch.no_grad():
        base = run()
        torch.testing.assert_close(base, case(), rtol=0, atol=1e-10)
        known = {id(p) for p in case.model.parameters()}
        with fullrank.repair(case.model, remedy, batch=case.batch):
            stir([p for p in case.model.parameters() if id(p) not in known])
            torch.testing.assert_close(run(), case(), rtol=0, atol=1e-10)
        torch.testing.assert_close(run(), base, rtol=0, atol=1e-10)
    torch._dynamo.reset()


def test_a_failing_proof_takes_everything_back():
    """The forward that is to prove the second of three remedies fails."""
    case = build("gpt2")
    state = everything(case.model)
    calls = [0]

    def fails(*args):
        calls[0] += bool(hasattr(case.model.h[0].attn, "fullrank_attn_scale_after"))
        if calls[0] > 1:
            raise StopError

    hook = case.model.ln_f.register_forward_pre_hook(fails)
    try:
        with pytest.raises(RemedyError, match="does not run on this batch: StopError"):
            fullrank.repair(case.model, ["scaled-init", "attn-scale", "layer-scale"], batch=case.batch)
    finally:
        hook.remove()
    assert [what for what in changes(state, everything(case.model)) if what != "versions"] == []
    with pytest.raises(RemedyError, match="is no remedy"):
        fullrank.repair(case.model, "attn-skale", batch=case.batch)
