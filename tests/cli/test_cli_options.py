"""Every option of `fullrank examine` reaches the measurement, and what makes no sense is one sentence."""

import pytest

from fullrank.report import Report

SMALL = "arch:gpt2?n_layer=2&n_embd=8&n_head=2&n_positions=64&vocab_size=50&bos_token_id=49&eos_token_id=49"


@pytest.fixture
def report(fullrank):
    def run(*arguments):
        result = fullrank("examine", SMALL, *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return Report.from_json(result.stdout)

    return run


def sites(report):
    return {row.site for row in report.rows}


def test_gradients_and_weights_are_taken_where_asked_for(report):
    assert not sites(report("--no-spectrum")) & {"gradient", "weights"}
    found = report("--no-spectrum", "--gradients", "--probes", "2", "--weights")
    assert {"gradient", "weights"} <= sites(found)
    assert found.about["gradients"].startswith("2 random projections")


def test_a_time_budget_is_handed_on(report):
    found = report("--seconds", "0.0001")
    assert {row.n for row in found.rows.where(metric="similarity").rows} == {1}
    assert any("time budget of 0.0001 s" in note for note in found.about["notes"])


def test_contexts_and_heads_are_handed_on(report):
    found = report("--contexts", "16,32", "--heads", "1.0")
    assert any(row.scope.endswith("context=16") for row in found.rows)
    assert {(row.layer, row.head) for row in found.rows.where(metric="attention_s2").rows} == {(1, 0)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_of_the_weights(report, dtype):
    found, plain = report("--dtype", dtype, "--no-spectrum"), report("--no-spectrum")
    assert found.about["dtype"] == dtype
    place = {"metric": "rms", "layer": 2, "site": "stream", "part": "out", "scope": "late"}
    (row,), (other,) = found.rows.where(**place).rows, plain.rows.where(**place).rows
    assert row.value == pytest.approx(other.value, rel=2e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--probes", "2"), "--gradients"),
        (("--gradients", "--probes", "0"), "at least one random projection"),
        (("--seconds", "0"), "no time budget"),
        (("--seconds", "nan"), "no time budget"),
        (("--seconds", "5", "--contexts", "16,32"), "does not go with contexts="),
        (("--contexts", "16"), "cannot be compared"),
        (("--contexts", "a,b"), "are no lengths"),
        (("--heads", "x"), "is no head"),
        (("--heads", "1.9"), "names head 9"),
        (("--heads", "1.0", "--no-spectrum"), "leaves out"),
        (("--dtype", "int8"), "is not one of"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(fullrank, here, arguments, says):
    result = fullrank("examine", SMALL, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
