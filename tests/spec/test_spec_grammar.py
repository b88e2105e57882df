import pytest

from fullrank.errors import SpecError
from fullrank.spec import Spec, parse


def test_a_hub_id_has_at_most_one_slash():
    assert parse("bert-base-uncased") == Spec("bert-base-uncased", "hub", "bert-base-uncased")
    assert parse("meta-llama/Llama-3.2-1B").kind == "hub"


def test_an_existing_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("checkpoint").kind == "hub"
    (tmp_path / "checkpoint").mkdir()
    assert parse("checkpoint").kind == "directory"
    assert parse("./checkpoint").kind == "directory"
    assert parse(str(tmp_path)).kind == "directory"


def test_a_json_file_is_a_configuration(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert parse(str(file)) == Spec(str(file), "config", str(file))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("24", 24),
        ("1e-5", 1e-5),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("gelu", "gelu"),
        ("[1,2]", [1, 2]),
        ('{"rope_type":"default"}', {"rope_type": "default"}),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_are_json_or_text(written, value):
    assert parse(f"arch:vit?option={written}&other=1").options == (("option", value), ("other", 1))


def test_an_architecture_needs_no_options():
    assert parse("arch:llama") == Spec("arch:llama", "architecture", "llama")


def test_a_python_factory_is_a_module_and_a_name():
    assert parse("python:package.module:factory").target == "package.module:factory"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("arch:", "names no architecture"),
        ("arch:vit?hidden_size", "name=value"),
        ("arch:vit?a=1&a=2", "'a' twice"),
        ("arch:vit?=3", "name=value"),
        ("arhc:vit", "did you mean 'arch'"),
        ("python:module", "package.module:factory"),
        ("python:a-b:c", "package.module:factory"),
        ("./nowhere", "nothing is there"),
        ("/nowhere/at/all", "nothing is there"),
        ("nowhere/config.json", "nothing is there"),
        ("a/b/c", "nothing is there"),
        ("two words", "no known form"),
        ("-x", "no known form"),
        ("demo", "fullrank demo"),
    ],
)
def test_every_other_text_is_answered_in_one_sentence(text, says):
    with pytest.raises(SpecError, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_file_of_weights_is_not_a_spec(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SpecError, match="pass the directory"):
        parse(str(tmp_path / "model.safetensors"))
