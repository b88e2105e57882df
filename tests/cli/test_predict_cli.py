"""`fullrank predict`: what it prints, the map, the overlay, and refusals that leave nothing behind."""

import json

import pytest

from fullrank.report import Report

GPT2 = "arch:gpt2?n_layer=2&n_embd=32&n_head=2&vocab_size=50&n_positions=64"


@pytest.fixture
def refused(fullrank, here):
    """Predict, asking for a page, and be refused."""

    def run(says, *arguments):
        result = fullrank("predict", *arguments, "--html", "page.html")
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("fullrank: ")
        assert result.stderr.count("\n") == 1
        assert says in result.stderr
        assert sorted(here.rglob("*")) == []
        return result.stderr

    return run


def test_it_prints_the_architecture_the_theories_the_answers_and_who_was_left_out(fullrank):
    result = fullrank("predict", GPT2, "--context", "32")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "2 blocks of width 32, 2 heads of 16, pre-LayerNorm" in said
    assert "causal attention over 32 tokens" in said
    order = ["theories, by how well", "giorlandino_goldt", "answers", "qk_std", "similarity by theory", "left out"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)


def test_json_is_the_report_and_nothing_else(fullrank):
    result = fullrank("predict", GPT2, "--context", "32", "--theories", "giorlandino_goldt,noci", "--json")
    report = Report.from_json(result.stdout)
    assert report.primary == "theory:giorlandino_goldt"
    assert {row.source for row in report.rows} == {"theory:giorlandino_goldt", "theory:noci"}
    assert report.prediction.architecture["context"] == 32


def test_the_overlay_lays_the_prediction_over_the_model_that_was_measured(fullrank, here):
    result = fullrank("predict", GPT2, "--context", "32", "--overlay", "--html", "both.html")
    assert result.exit_code == 0, result.output
    assert "similarity over 2 layers: theory:giorlandino_goldt errs by" in " ".join(result.stdout.split())
    page = (here / "both.html").read_text(encoding="utf-8")
    assert "measured and predicted" in page
    assert "Similarity over 2 layers: theory:giorlandino_goldt errs by" in page
    both = json.loads(fullrank("predict", GPT2, "--context", "32", "--overlay", "--json").stdout)
    measured, predicted = map(Report.from_content, both)
    assert {row.source for row in measured.rows} == {"measured"}
    at_first = [
        next(r.value for r in one.rows if (r.metric, r.layer, r.scope, r.part) == ("similarity", 0, "late", "out"))
        for one in (measured, predicted)
    ]
    assert at_first[0] == pytest.approx(at_first[1], abs=0.05)  # theory starts from the measured correlation


def test_a_map_marks_the_architectures_own_place(fullrank, here):
    arguments = ("--vary", "residual_scale=0.1:10:7", "--vary", "qk_std=0.002:0.2:5")
    result = fullrank("predict", GPT2, "--context", "32", *arguments, "--html", "map.html")
    assert result.exit_code == 0, result.output
    assert "@ this architecture" in result.stdout
    assert "What trains: residual_scale and qk_std" in (here / "map.html").read_text(encoding="utf-8")
    content = json.loads(fullrank("predict", GPT2, "--context", "32", *arguments, "--json").stdout)
    assert [len(axis["values"]) for axis in content["axes"]] == [7, 5]
    assert content["axes"][0]["values"] == pytest.approx([0.1 * 10 ** (n / 3) for n in range(7)])  # equal ratios
    assert content["axes"][0]["own"] == 1
    assert content["here"] == content["phases"][content["phase"][3][2]]


def test_a_line_over_depth_takes_whole_numbers(fullrank):
    content = json.loads(fullrank("predict", GPT2, "--context", "32", "--vary", "depth=1:5:5", "--json").stdout)
    assert content["axes"][0]["values"] == [1, 2, 3, 4, 5]
    assert content["axes"][0]["own"] == 2
    content = json.loads(fullrank("predict", GPT2, "--context", "32", "--vary", "depth=1:5", "--json").stdout)
    assert content["axes"][0]["values"] == [1, 2, 3, 4, 5]  # of fifty points
    assert len(content["phase"]) == 5


def test_what_no_theory_is_and_what_no_architecture_is(refused):
    assert "giorlandino_goldt, noci" in refused("theories= names 'nocy'; there are", GPT2, "--theories", "nocy")
    refused("is no architecture", "arch:gpt22")
    refused("nothing is there", "./nowhere")
    refused("context=1", GPT2, "--context", "1")
    refused("64 learned positions", GPT2, "--context", "65")


def test_ranges_that_are_none(refused):
    for words in ("qk_std", "qk_std=", "qk_std=1", "qk_std=2:1", "qk_std=0.1:a", "qk_std=0.1:1:1", "qk_std=0:inf"):
        refused(f"--vary '{words}' must be name=low:high:points", GPT2, "--vary", words)
    refused("--vary names 'qk_std' twice", GPT2, "--vary", "qk_std=0.1:1", "--vary", "qk_std=0.1:1")
    refused("more than 100,000 points", GPT2, "--vary", "qk_std=0.1:1:100001")
    refused("give one of them", GPT2, "--vary", "qk_std=0.1:1", "--overlay")
    for keys in ("nope", "giorlandino_goldt"):
        refused("--theories chooses for a report", GPT2, "--vary", "qk_std=0.1:1", "--theories", keys)


def test_fields_that_cannot_vary_and_values_that_none_can_have(refused):
    assert "qk_std" in refused("names 'residual': what can vary is residual_scale", GPT2, "--vary", "residual=0.1:1")
    refused("must be 0 or a positive number", GPT2, "--vary", "qk_std=-0.1:1")
    refused("context=1 must be a whole number of 2 or more", GPT2, "--vary", "context=1:64:64")
    refused("heads=3 do not divide width=32", GPT2, "--vary", "heads=1:4:4")
    refused("names qk_std and std_q", GPT2, "--vary", "qk_std=0.1:1", "--vary", "std_q=0.1:1")
