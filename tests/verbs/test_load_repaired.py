"""Saved with repairs, loaded with them: by the library, by the command line's loader, and not by accident without."""

import json

import kinds
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fullrank
from fullrank.errors import RemedyError, SpecError
from fullrank.remedies import repairs_in
from fullrank.spec import load
from fullrank.verbs.load_repaired import loaded
from untouched import changes, everything


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


BATCH = {"input_ids": kinds.ids(), "use_cache": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A repaired model with values of its own in what was added, saved as trainers save it; and its answer."""
    directory = tmp_path_factory.mktemp("repaired") / "checkpoint"
    model = gpt2()
    fullrank.repair(model, ["attn-scale?start=0.5", "scaled-init"], batch=BATCH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_scale" in name:
                parameter.add_(torch.arange(parameter.numel()))
        answer = model(**BATCH).logits
    model.save_pretrained(directory)
    return directory, answer


def test_the_record_stands_beside_the_weights_and_in_the_configuration(saved):
    directory, _ = saved
    recorded = json.loads((directory / "config.json").read_text())["fullrank_repairs"]
    assert [(one["name"], one["structural"]) for one in recorded] == [("attn-scale", True), ("scaled-init", False)]
    assert recorded[0]["parameters"] == {"start": 0.5}
    assert "fullrank_repairs" in load_file(directory / "model.safetensors")


def test_a_plain_model_takes_the_repairs_and_the_weights(saved):
    directory, answer = saved
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval()
    repair = fullrank.load_repaired(model, directory, batch=BATCH)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, answer)
    assert [one["name"] for one in repairs_in(model)] == ["attn-scale"]
    assert repair.undo()
    assert repairs_in(model) == []


def test_from_a_state_dict(saved):
    directory, answer = saved
    model = gpt2()
    weights = load_file(directory / "model.safetensors") | {"lm_head.weight": None}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    fullrank.load_repaired(model, weights, batch=BATCH)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, answer)


def test_a_spec_comes_with_its_repairs(saved):
    directory, answer = saved
    subject = loaded(str(directory))
    assert "repaired, as it was saved, with attn-scale" in subject.description
    with torch.no_grad():
        torch.testing.assert_close(subject.model(**BATCH).logits, answer)
    of_spec, of_model = (
        fullrank.examine(one, BATCH, spectrum=False, reference=False) for one in (str(directory), subject.model)
    )
    asked = {"metric": "similarity", "layer": 2, "site": "stream", "part": "out", "scope": "all"}
    assert of_spec.rows.where(**asked).rows[0].value == pytest.approx(of_model.rows.where(**asked).rows[0].value)


def test_loading_without_the_repairs_is_one_sentence(saved):
    directory, _ = saved
    with pytest.raises(SpecError, match=r"was saved with the repairs attn-scale.*load_repaired"):
        load(str(directory))


def test_weights_of_another_repair_are_refused_and_nothing_changes(saved):
    directory, _ = saved
    model = gpt2()
    with fullrank.repair(model, "attn-scale", batch=BATCH):
        before = everything(model)
        with pytest.raises(
            RemedyError, match=r"saved with the repairs .*0\.5.* and this model is repaired with .*0\.0"
        ):
            model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
        with pytest.raises(RemedyError, match="saved without repairs"):
            model.load_state_dict(gpt2().state_dict())
        assert changes(before, everything(model)) == []


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": torch.zeros(2)}, "without structural repairs"),
        ({"fullrank_repairs": torch.zeros(3, dtype=torch.uint8)}, "no record of repairs"),
        ("nowhere", "holds no safetensors"),
    ],
)
def test_bad_weights_are_one_sentence_and_leave_the_model_alone(weights, said, tmp_path):
    model = gpt2()
    before = everything(model)
    with pytest.raises(RemedyError, match=said):
        fullrank.load_repaired(model, weights if isinstance(weights, dict) else tmp_path / weights, batch=BATCH)
    assert changes(before, everything(model)) == []


def test_weights_that_do_not_fit_leave_the_model_alone(saved, tmp_path):
    directory, _ = saved
    weights = load_file(directory / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    save_file(weights, tmp_path / "some.safetensors")
    model = gpt2()
    before = everything(model)
    with pytest.raises(RemedyError, match=r"transformer\.ln_f\.bias are missing"):
        fullrank.load_repaired(model, tmp_path / "some.safetensors", batch=BATCH)
    assert changes(before, everything(model)) == []


def test_no_pickle_is_read(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.bin")
    with pytest.raises(RemedyError, match="is no safetensors file"):
        fullrank.load_repaired(gpt2(), tmp_path / "weights.bin", batch=BATCH)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_of_a_wrapped_model(saved, prefix):
    directory, answer = saved
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model = gpt2()
    fullrank.load_repaired(model, {prefix + name: value for name, value in weights.items()}, batch=BATCH)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, answer)


def test_other_names_before_the_record_are_no_wrapper(saved):
    directory, _ = saved
    weights = {f"student.{name}": value for name, value in load_file(directory / "model.safetensors").items()}
    model = gpt2()
    before = everything(model)
    with pytest.raises(RemedyError, match=r"do not fit this GPT2LMHeadModel: student\."):
        fullrank.load_repaired(model, weights, batch=BATCH)
    assert changes(before, everything(model)) == []


def test_a_base_model_that_was_repaired_before_it_was_wrapped_by_others(saved):
    """The record lies deeper than the model: it is not wanted at its old place."""

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.nn.ModuleDict({"inner": gpt2()})

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()["inner"]

        def forward(self, input_ids, use_cache=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache).logits

    one, other = Whole().eval(), Whole().eval()
    fullrank.repair(one.inner, "attn-scale?start=0.5", batch=BATCH)
    fullrank.load_repaired(other, one.state_dict(), batch=BATCH)
    with torch.no_grad():
        assert torch.equal(other(**BATCH), one(**BATCH))


@pytest.fixture
def half(saved, tmp_path):
    """What a plain model saves that was made from the configuration of a repaired one."""
    directory, _ = saved
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval()
    model.save_pretrained(tmp_path / "half")
    return model, tmp_path / "half"


def test_a_configuration_that_names_repairs_which_the_weights_do_not_have(half):
    _, directory = half
    said = "its configuration names the repairs attn-scale, and its weights were saved without them"
    with pytest.raises(RemedyError, match=said):
        fullrank.load_repaired(gpt2(), directory, batch=BATCH)
    with pytest.raises(RemedyError, match=said):
        fullrank.load_repaired(gpt2(), directory / "model.safetensors", batch=BATCH)
    with pytest.raises(RemedyError, match=said):
        loaded(str(directory))


def test_examining_a_model_whose_configuration_names_repairs_says_that_they_are_not_in_force(half, saved):
    model, _ = half
    asked = {"spectrum": False, "reference": False}
    note = "its configuration names the repairs attn-scale, which are not in force: this is the model without them."
    assert note in fullrank.examine(model, BATCH, **asked).about["notes"]
    fullrank.load_repaired(model, saved[0], batch=BATCH)
    part = {"input_ids": BATCH["input_ids"]}
    for one, batch in ((model, BATCH), (model.transformer, part)):  # a part shares the configuration of the whole
        assert not [said for said in fullrank.examine(one, batch, **asked).about["notes"] if "not in force" in said]
