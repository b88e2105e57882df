import random

import numpy as np
import torch

import tiny
from fullrank.spec import demo, load

SMALL = "arch:bert?hidden_size=16&num_hidden_layers=2&num_attention_heads=2&intermediate_size=32&vocab_size=40"


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
