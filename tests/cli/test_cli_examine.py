"""`fullrank examine` from end to end on a tiny checkpoint."""

import json
import sys

import pytest
import torch

from fullrank.report import Report

VIT = "arch:vit?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&image_size=32&patch_size=8"
T5 = "arch:t5?num_layers=1&num_decoder_layers=1&d_model=8&d_ff=8&num_heads=2&d_kv=4&vocab_size=50"


@pytest.fixture
def report(fullrank):
    """Examine with --json and read what comes out."""

    def run(*arguments):
        result = fullrank("examine", *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return Report.from_json(result.stdout)

    return run


def test_the_report_is_printed_and_nothing_is_written(fullrank, checkpoint, here):
    result = fullrank("examine", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for words in ("2 blocks, 2 heads, width 16", "8 texts that ship with fullrank", "similarity", "next", "--html"):
        assert words in " ".join(result.stdout.split())
    assert list(here.iterdir()) == []


def test_the_page_is_written_and_its_path_is_the_last_line(fullrank, checkpoint, here):
    result = fullrank("examine", checkpoint, "--html", "page.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"The page: {here / 'page.html'}")
    assert "--json" in result.stdout and "--html" not in result.stdout  # what is done is not recommended
    assert "<html" in (here / "page.html").read_text()
    assert [file.name for file in here.iterdir()] == ["page.html"]


def test_json_is_the_report_and_nothing_else(fullrank, checkpoint, here):
    result = fullrank("examine", checkpoint, "--json", "--html", "page.html")
    assert json.loads(result.stdout)["schema"] == 1
    assert result.stderr.strip() == f"The page: {here / 'page.html'}"
    assert len(Report.from_json(result.stdout).rows) > 100


def test_python_and_the_command_line_give_the_same_numbers(report, checkpoint):
    from fullrank.spec import inputs, load
    from fullrank.verbs.examine import examine

    subject = load(str(checkpoint))
    expected = examine(subject, inputs(subject, context=20, documents=3), spectrum=False)
    given = report(checkpoint, "--context", "20", "--documents", "3", "--no-spectrum")
    assert given.rows == Report.from_json(expected.to_json()).rows
    assert given.about["input"] == expected.about["input"]


def test_init_gives_fresh_weights(report, checkpoint):
    fresh, trained = report(checkpoint, "--init", "--no-spectrum"), report(checkpoint, "--no-spectrum")
    assert fresh.about["fresh"] is True
    assert trained.about["fresh"] is False
    assert fresh.rows != trained.rows


def test_the_seed_decides_what_is_random(report):
    spec = "arch:gpt2?n_layer=1&n_embd=8&n_head=2&n_positions=64&vocab_size=50&bos_token_id=49&eos_token_id=49"
    one, same, other = (report(spec, "--no-spectrum", "--seed", seed) for seed in ("1", "1", "2"))
    assert one.rows == same.rows
    assert one.rows != other.rows
    assert one.about["input"]["kind"] == "random tokens"


def test_spectra_are_taken_unless_left_out(report, checkpoint):
    metrics = {row.metric for row in report(checkpoint).rows}
    without = {row.metric for row in report(checkpoint, "--no-spectrum").rows}
    assert "attention_s2" in metrics - without
    assert without < metrics


def test_texts_lines_and_images_are_read(report, checkpoint, here):
    (here / "a.txt").write_text("the tide and the moon " * 30)
    assert report(checkpoint, "--text", "a.txt", "--context", "40").about["input"]["sequences"] == 4
    (here / "b.jsonl").write_text('{"text": "the tide and the moon"}\n{"text": "a sea"}\n')
    assert report(checkpoint, "--data", "b.jsonl").about["input"]["tokens"] == 7 + 4
    from PIL import Image

    for name in ("c.png", "d.png", "e.png"):
        Image.effect_noise((32, 32), 50.0).save(here / name)
    seen = report(VIT, "--images", "c.png", "--images", "[de].png").about["input"]
    assert (seen["kind"], seen["sequences"]) == ("images", 3)


def test_an_encoder_decoder_and_a_vision_model_are_examined(report):
    assert {stack["name"] for stack in report(T5, "--context", "16").about["stacks"]} >= {"encoder", "decoder"}
    assert report(VIT).about["input"]["kind"] == "synthetic images"


def test_a_factory_in_the_current_directory_is_examined_with_its_batch(report, here):
    (here / "cli_factory.py").write_text(
        "import torch\n"
        "def make():\n"
        "    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)\n"
        "    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)\n"
        "    return model, torch.randn(4, 10, 8)\n"
    )
    given = report("python:cli_factory:make")
    sys.modules.pop("cli_factory")
    assert given.about["stacks"][0]["blocks"] == 3
    assert given.about["input"]["sequences"] == 4


def test_dtype_and_device_are_as_asked(report, checkpoint):
    given = report(checkpoint, "--dtype", "float64", "--device", "cpu", "--no-spectrum")
    assert (given.about["dtype"], given.about["device"]) == ("float64", "cpu")


def test_the_random_state_is_left_alone(fullrank, checkpoint):
    state = torch.get_rng_state()
    fullrank("examine", checkpoint, "--init")
    assert torch.equal(state, torch.get_rng_state())
