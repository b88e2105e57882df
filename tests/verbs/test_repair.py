"""The verb and its handle: composing, printing, taking back, refusing; what models may be wrapped in meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
import transformers as hf
from remedy_patients import build, stir
from torch import nn

import fullrank
from fullrank.errors import BatchError, FullrankError, RemedyError
from fullrank.remedies import repairs_in
from fullrank.verbs.save_repaired import save_repaired
from untouched import changes, everything

BOTH = ["attn-scale", "scaled-init"]
"""One that adds parameters to attention, and one that changes weights."""


@pytest.fixture
def case():
    return build("gpt2")


@pytest.fixture
def repair(case):
    """`repair(names, …)` on the case."""
    return lambda names, **options: fullrank.repair(case.model, names, **({"batch": case.batch} | options))


def answer(case, model=None):
    with torch.no_grad():
        return case.answer(case.model if model is None else model)


def added(model):
    return {name: p for name, p in model.named_parameters() if "fullrank" in name}


def names_in(model):
    return [one["name"] for one in repairs_in(model)]


# ---------------------------------------------------------------- composing


@pytest.mark.parametrize(
    "names",
    [
        ["attn-scale?start=0.5", "layer-scale?start=0.2"],
        {"attn-scale": {"start": 0.5}, "layer-scale": {"start": 0.2}},
        ("attn-scale?start=0.5", "layer-scale?start=2e-1"),
        iter(["attn-scale?start=0.5", "layer-scale?start=0.2"]),
    ],
    ids=["list", "mapping", "tuple", "iterator"],
)
def test_remedies_compose_however_they_are_written(case, repair, names):
    with fullrank.repair(case.model, "attn-scale", batch=case.batch, start=0.5), repair("layer-scale?start=0.2"):
        expected = answer(case)
    with repair(names) as handle:
        assert torch.equal(answer(case), expected)
        assert [one.asked.parameters["start"] for one in handle.applied] == [0.5, 0.2]
        assert names_in(case.model) == ["attn-scale", "layer-scale"]
        assert handle.parameters == 3 * 4 + 6 * 32


def test_a_parameter_goes_to_the_remedy_that_has_it(repair):
    with repair(["attn-scale", "hopfield"], average=0.25) as handle:
        assert [one.asked.parameters.get("average") for one in handle.applied] == [None, 0.25]


def test_the_order_is_the_one_that_was_asked_for(case, repair):
    found = []
    for names in (["attn-scale?start=1", "position-gate"], ["position-gate", "attn-scale?start=1"]):
        with repair(names) as handle:
            stir(added(case.model))
            found.append((names_in(case.model), [one.asked.remedy.name for one in handle.applied]))
    assert found[0] == (["attn-scale", "position-gate"],) * 2
    assert found[1] == (["position-gate", "attn-scale"],) * 2


# ---------------------------------------------------------------- printing


def test_it_prints_what_where_how_many_and_how_far_the_output_moved(repair):
    with repair(["attn-scale?start=0.5", "scaled-init"]) as handle:
        first, second = str(handle).splitlines()
        assert first.startswith("attn-scale?start=0.5 at 3 places (decoder layer 1 self (h.0.attn) … ")
        assert "; 12 parameters added; the output moves by 0." in first
        assert second.startswith("scaled-init [init-only] at 6 places (h.0.attn.c_proj.weight … h.2.mlp.c_proj.weight)")
        assert "; no parameters added; the output moves by 0." in second
        assert repr(handle) == str(handle)
    assert str(handle).endswith("attn-scale, scaled-init undone; the model is as it was, bit for bit.")


def test_what_moves_nothing_says_so(repair):
    with repair("attn-scale") as handle:
        assert str(handle).endswith("; the output is the same, bit for bit.")


def test_the_distance_that_is_printed_is_that_of_the_outputs(case, repair):
    before = answer(case)
    with repair("center-attention") as handle:
        moved = answer(case) - before
        (one,) = handle.applied
        assert one.proof.largest == pytest.approx(float(moved.abs().max()), rel=1e-6)
        assert one.proof.relative == pytest.approx(float(moved.norm() / before.norm()), rel=1e-6)


# ---------------------------------------------------------------- undoing


def test_undone_bit_for_bit_also_where_the_block_ends_in_an_error(case, repair):
    state = everything(case.model)
    with pytest.raises(ZeroDivisionError), repair([*BOTH, "center-attention"]) as handle:
        assert handle.in_force
        1 / 0  # noqa: B018
    assert not handle.in_force
    assert [what for what in changes(state, everything(case.model)) if what != "versions"] == []
    assert handle.undo() == "attn-scale, scaled-init, center-attention undone; the model is as it was, bit for bit."


def test_after_training_the_structure_goes_and_the_weights_stay(case, repair):
    names = list(case.model.state_dict())
    handle = repair(BOTH)
    assert not handle.trained
    optimiser = torch.optim.SGD(case.model.parameters(), lr=0.1)
    case().square().sum().backward()
    optimiser.step()
    assert handle.trained
    trained = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    assert handle.undo() == (
        "attn-scale, scaled-init removed; the model was trained since and keeps its trained weights. "
        "What was trained in added parameters is gone."
    )
    assert list(case.model.state_dict()) == names
    assert all(torch.equal(p, trained[name]) for name, p in case.model.named_parameters())
    assert not repairs_in(case.model)


def test_where_only_what_was_added_is_trained_the_model_is_as_it_was(case, repair):
    before = answer(case)
    handle = repair(BOTH)
    optimiser = torch.optim.AdamW(added(case.model).values(), lr=0.1)
    case().square().sum().backward()
    optimiser.step()
    case.model.zero_grad()
    assert not handle.trained
    assert handle.undo().endswith("bit for bit. What was trained in added parameters is gone.")
    assert torch.equal(answer(case), before)


def test_undone_in_any_other_order_is_one_sentence_and_changes_nothing(case, repair):
    before = answer(case)
    first, second = repair("scaled-init"), repair(["attn-scale", "center-attention"])
    state = everything(case.model)
    with pytest.raises(RemedyError) as said:
        first.undo()
    assert str(said.value) == "attn-scale, center-attention was applied after scaled-init; undo that first."
    assert changes(state, everything(case.model)) == []
    assert first.in_force and second.in_force
    second.undo()
    first.undo()
    assert torch.equal(answer(case), before)


def test_one_whose_handle_was_not_kept_stays(case, repair):
    first = repair("scaled-init")
    repair("attn-scale")
    gc.collect()
    with pytest.raises(RemedyError, match="its handle was not kept, so that neither can be undone"):
        first.undo()
    assert names_in(case.model) == ["scaled-init", "attn-scale"]


def test_what_stands_in_the_way_is_said_and_nothing_changes(case, repair):
    handle = repair("center-attention")
    forward = case.model.h[0].attn.forward
    case.model.h[0].attn.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    state = everything(case.model)
    with pytest.raises(RemedyError, match="center-attention cannot be undone: the forward of a GPT2Attention was repl"):
        handle.undo()
    assert changes(state, everything(case.model)) == []
    case.model.h[0].attn.forward = forward
    assert handle.undo()


@pytest.mark.parametrize("what", ["other values", "the same values", "the same values in other tensors"])
def test_weights_that_are_loaded_meanwhile(case, repair, what):
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    handle = repair(BOTH)
    weights = {name: value.clone() for name, value in case.model.state_dict().items()}
    if what == "other values":
        weights["h.0.attn.c_proj.weight"] = weights["h.0.attn.c_proj.weight"].flip(0)  # of the same sum
    case.model.load_state_dict(weights, assign=what.endswith("tensors"))
    said = handle.undo()
    if what == "other values":
        assert said.endswith("keeps its trained weights.")
        assert torch.equal(case.model.h[0].attn.c_proj.weight, weights["h.0.attn.c_proj.weight"])
    else:
        assert said.endswith("as it was, bit for bit.")
        assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())


def test_a_type_that_holds_the_values_is_no_training_and_one_that_rounds_is_said(case, repair):
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    handle = repair(BOTH)
    case.model.float()
    assert not handle.trained
    assert handle.undo() == (
        "attn-scale, scaled-init removed; the model was converted to another type since, and its weights stay as they "
        "are now."
    )
    case = build("gpt2")
    case.model.bfloat16()
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    handle = fullrank.repair(case.model, BOTH, batch=case.batch)
    case.model.float()
    assert handle.undo().endswith("the model has the values that it had, bit for bit, in another type.")
    assert all(torch.equal(p.bfloat16(), before[name]) for name, p in case.model.named_parameters())


def test_running_statistics_that_move_are_no_training_and_are_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(32)
            self.body = build("torch_encoder").model

        def forward(self, src):
            return self.body(self.norm(src.mT).mT)

    model = Net().double().eval()
    batch = {"src": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).double()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = fullrank.repair(model, BOTH, batch=batch)
    model.train()
    with torch.random.fork_rng(devices=[]):
        model(**batch)
    moved = model.norm.running_mean.clone()
    assert not handle.trained
    assert handle.undo().endswith(
        "the model's parameters are as they were, bit for bit; 3 buffers, such as running statistics, moved since and "
        "stay."
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model.norm.running_mean, moved)


# ---------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("centre-attention", r"'centre-attention' is no remedy \(did you mean 'center-attention'"),
        ("attn_scale", r"'attn_scale' is no remedy \(did you mean 'attn-scale'"),
        ("nothing-like-it", "'nothing-like-it' is no remedy; `fullrank remedies` lists them"),
        ("", "'' is no remedy"),
        ([], "no remedy is named"),
        (None, "remedies are a name, a list of names, or a mapping .*, and NoneType was given"),
        (3, "and int was given"),
        ({"attn-scale"}, "and set was given"),
        ([["attn-scale"]], "a remedy is named by text, and list was given"),
        ({"attn-scale": 0.5}, "'attn-scale': 0.5 names no remedy with a mapping"),
        ({3: {}}, "3: {} names no remedy"),
        (["attn-scale", "attn-scale?start=1"], "attn-scale is named twice"),
        ("attn-scale?start", "has the option 'start'; options are written name=value"),
        ("attn-scale?start=1&start=2", "gives the option 'start' twice"),
        ("attn-scale?stort=1", r"stort= is no parameter of attn-scale \(did you mean 'start'\?\); its parameters are"),
        ("attn-scale?start=-7", "start=-7 of attn-scale is not accepted; it is a number at least -1 and at most 100"),
        ("attn-scale?start=much", "start='much' of attn-scale is not accepted"),
        ("attn-scale?start=true", "start=True of attn-scale is not accepted"),
        ("attn-scale?start=NaN", "start=nan of attn-scale is not accepted"),
        (
            "position-gate?kind=elementwise",
            r"kind='elementwise' of position-gate is not known \(did you mean 'element-w",
        ),
        ("deflate-attention", "deflate-attention would let tokens of a causal model see later ones"),
        ("polarise", "polarise .*has none that it knows"),
        (["scaled-init", "attn-scale", "deflate-attention"], "deflate-attention would let tokens"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(case, repair, names, said):
    answer(case)
    state = everything(case.model)
    with pytest.raises(RemedyError, match=said) as caught:
        repair(names)
    assert "\n" not in str(caught.value)
    assert [what for what in changes(state, everything(case.model)) if what != "versions"] == []
    assert not repairs_in(case.model)


@pytest.mark.parametrize(
    ("names", "parameters", "said"),
    [
        (
            ["attn-scale", "layer-scale"],
            {"start": 0.5},
            "start= is a parameter of attn-scale and layer-scale; write it",
        ),
        (["attn-scale", "hopfield"], {"sise": 1}, "sise= is a parameter of none of attn-scale, hopfield"),
        ("attn-scale", {"sise": 1}, "sise= is no parameter of attn-scale"),
        ("attn-scale?start=1", {"start": 1}, "start= of attn-scale is given twice"),
    ],
)
def test_parameters_that_belong_nowhere_or_twice(repair, names, parameters, said):
    with pytest.raises(RemedyError, match=said):
        repair(names, **parameters)


def test_an_error_in_the_block_is_not_hidden_by_one_of_undoing(case, repair):
    outer = None
    with pytest.raises(ZeroDivisionError) as caught, repair("scaled-init") as first:
        outer = repair("attn-scale")
        1 / 0  # noqa: B018
    assert caught.value.__notes__ == ["attn-scale was applied after scaled-init; undo that first."]
    assert first.in_force
    outer.undo()
    first.undo()
    with pytest.raises(RemedyError, match="attn-scale was applied after scaled-init"), repair("scaled-init") as first:
        outer = repair("attn-scale")
    outer.undo()
    first.undo()


def test_a_second_time_is_refused_also_in_a_part_and_in_a_copy(case, repair):
    with repair("attn-scale"):
        state = everything(case.model)
        with pytest.raises(RemedyError, match="attn-scale is in force on this GPT2Model already; undo it first"):
            repair(["scaled-init", "attn-scale?start=1"])
        whole = nn.Sequential(case.model)
        with pytest.raises(RemedyError, match="attn-scale is in force on this Sequential already"):
            fullrank.repair(whole, "attn-scale", batch=(case.batch["input_ids"],))
        assert changes(state, everything(case.model)) == []
    with repair("attn-scale"):
        pass


def test_a_model_that_fails_on_the_batch(case, repair):
    linear = nn.Linear(2, 2)
    state = everything(case.model)
    with pytest.raises(BatchError, match="GPT2Model does not run on this batch: ValueError: You have to specify"):
        repair("attn-scale", batch={"attention_mask": torch.ones(2, 4)})
    with pytest.raises(FullrankError, match="repair takes a torch module, and was given str"):
        fullrank.repair("gpt2", "attn-scale")
    with pytest.raises(BatchError, match="batch= is needed"):
        fullrank.repair(linear, "attn-scale")
    with pytest.raises(RemedyError, match="attn-scale cannot be applied: "):
        fullrank.repair(linear, "attn-scale", batch=(torch.zeros(2, 3, 2),))
    assert changes(state, everything(case.model)) == []


def test_what_a_closed_gate_hides_is_applied_behind_it(case, repair):
    with repair(["skip-init", "temperature"]) as handle:
        assert handle.applied[1].parameters == 12
        assert not handle.notes


def test_two_that_stand_in_for_one_kernel_are_refused(case, repair):
    state = everything(case.model)
    with pytest.raises(RemedyError, match=r"softcap cannot be applied after learned-sink: .* by another edit already"):
        repair(["learned-sink", "softcap"])
    assert changes(state, everything(case.model)) == []


# ---------------------------------------------------------------- life of models


def test_a_model_is_freed_with_its_handle_and_without(case, repair):
    for kept in (True, False):
        case = build("gpt2")
        handle = fullrank.repair(case.model, BOTH, batch=case.batch)
        left = [weakref.ref(case.model), weakref.ref(case.model.h[0].attn.c_proj.weight)]
        del case
        if kept:
            assert all(one() is not None for one in left)
        del handle
        gc.collect()
        assert all(one() is None for one in left)


def test_a_copy_keeps_its_repairs_and_has_no_handle(case, repair):
    before = answer(case)
    handle = repair(BOTH)
    stir(added(case.model))
    other = copy.deepcopy(case.model)
    expected = answer(case)
    handle.undo()
    assert torch.equal(answer(case), before)
    assert torch.equal(answer(case, other), expected)
    assert names_in(other) == BOTH
    assert not names_in(case.model)
    with pytest.raises(RemedyError, match="it is a copy of a repaired model, and keeps its repairs"):
        fullrank.repair(other, "attn-scale", batch=case.batch)
    with fullrank.repair(other, "center-attention", batch=case.batch):
        assert names_in(other) == [*BOTH, "center-attention"]
    assert torch.equal(answer(case, other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(answer(case), before)


def test_a_repaired_model_is_pickled_whole(case, repair):
    with repair([*BOTH, "center-attention", "layer-scale", "value-residual"]):
        stir(added(case.model))
        expected = answer(case)
        other = pickle.loads(pickle.dumps(case.model))
    assert torch.equal(answer(case, other), expected)
    assert len(names_in(other)) == 5


def test_training_mode_frozen_weights_random_numbers_and_gradients_stay(case, repair):
    gc.collect()  # models of other tests that use the table of attention functions
    model = case.model.train()
    model.h[1].mlp.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    state = everything(model)
    handle = repair([*BOTH, "position-gate"])
    found = everything(model)
    assert torch.equal(found["random"], state["random"])
    assert found["modules"].keys() > state["modules"].keys()
    assert model.training and not model.h[1].mlp.training and model.h[0].mlp.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(added(model))
    handle.undo()
    assert [what for what in changes(state, everything(model)) if what != "versions"] == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_without_gradients_can_be_trained(case, repair, mode):
    with mode():
        handle = repair(BOTH)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    case().square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in added(case.model).values())
    case.model.zero_grad()
    assert handle.undo().endswith("bit for bit.")


# ---------------------------------------------------------------- wrapped models


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        pytest.param(torch.compile, marks=pytest.mark.slow),
    ],
)
def test_inside_wrappers_what_adds_no_parameters_is_applied(case, wrap, one_process):
    gc.collect()  # models of other tests that use the table of attention functions
    before = answer(case)
    wrapped = wrap(case.model) if wrap is not torch.compile else torch.compile(case.model, backend="eager")
    with fullrank.repair(wrapped, ["center-attention", "scaled-init"], batch=case.batch):
        assert names_in(wrapped) == ["center-attention", "scaled-init"]
        assert not torch.allclose(answer(case), before, atol=1e-3)
        with pytest.raises(RemedyError, match="is in force"):
            fullrank.repair(case.model, "scaled-init", batch=case.batch)
    assert torch.equal(answer(case), before)
    if wrap is torch.compile:
        with fullrank.repair(wrapped, "attn-scale", batch=case.batch) as handle:
            assert handle.parameters == 12
        torch._dynamo.reset()
        return
    state = everything(wrapped)
    with pytest.raises(
        RemedyError, match=r"attn-scale cannot be applied after scaled-init: .*inside data parallelism; edit it before"
    ):
        fullrank.repair(wrapped, ["scaled-init", "attn-scale"], batch=case.batch)
    assert [what for what in changes(state, everything(wrapped)) if what != "versions"] == []


def test_a_repaired_model_is_trained_in_ddp_and_undone_afterwards(case, repair, one_process):
    handle = repair(BOTH)
    wrapped = nn.parallel.DistributedDataParallel(case.model)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    case.answer(wrapped).square().sum().backward()
    assert all(p.grad is not None for p in added(case.model).values())
    optimiser.step()
    assert "keeps its trained weights" in handle.undo()


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=50)).double().eval()


LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
TEXT = {"input_ids": torch.arange(18).view(2, 9) % 50, "use_cache": False}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft
def test_adapters_inside_a_repaired_model_and_outside_of_one():
    gc.collect()
    model = llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, LORA).eval()
    state = everything(adapted)
    with torch.no_grad():
        before = adapted(**TEXT).logits
    with fullrank.repair(adapted, ["attn-scale?start=1", "value-residual"], batch=TEXT) as handle:
        assert handle.parameters > 0
        with torch.no_grad():
            assert not torch.allclose(adapted(**TEXT).logits, before, atol=1e-6)
    assert changes(state, everything(adapted)) == []
    plain = llama()
    handle = fullrank.repair(plain, "attn-scale?start=1", batch=TEXT)
    adapted = peft.get_peft_model(plain, LORA)
    with pytest.raises(RemedyError, match="attn-scale is in force"):
        fullrank.repair(adapted, "attn-scale", batch=TEXT)
    adapted(**TEXT).logits.square().sum().backward()
    assert handle.undo().endswith("bit for bit.")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft
def test_adapters_are_saved_without_what_was_added_and_it_is_said(tmp_path):
    def adapted(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(llama(), LORA).eval()

    model = adapted(1)
    handle = fullrank.repair(model, ["layer-scale?start=0.5", "scaled-init"], batch=TEXT)
    (note,) = handle.notes
    assert note.startswith(
        "PeftModel.save_pretrained saves the adapters alone, without what was added here: save the s"
    )
    stir(added(model))
    with torch.no_grad():
        expected = model(**TEXT).logits
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(RemedyError, match="holds adapters alone, as peft saves them, and no record of repairs: save"):
        fullrank.load_repaired(adapted(2), tmp_path / "adapters", batch=TEXT)
    save_repaired(model, tmp_path / "whole")
    for weights in (model.state_dict(), tmp_path / "whole"):
        other = adapted(2)
        fullrank.load_repaired(other, weights, batch=TEXT)
        with torch.no_grad():
            assert torch.equal(other(**TEXT).logits, expected)
    handle.undo()
    assert fullrank.repair(model, "scaled-init", batch=TEXT).notes == ()  # nothing that adapters would be missing
