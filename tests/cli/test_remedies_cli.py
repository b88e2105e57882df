"""`fullrank remedies`: the list, one in full, JSON, and names that are none."""

import json

import pytest
from rich.cells import cell_len

from fullrank.remedies import CATALOGUE

FIELDS = {
    *("name", "title", "addresses", "acts_on", "exactness", "formula", "parameters", "limits", "cost", "structural"),
    "papers",
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


def test_every_remedy_is_listed_under_where_it_acts_with_its_exactness(fullrank):
    result = fullrank("remedies")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(cell_len, lines)) <= 80
    listed = {line.split()[0]: line.split()[1] for line in lines if line.split()[:1] and line.split()[0] in CATALOGUE}
    assert listed == {one.name: one.exactness for one in CATALOGUE.values()}
    assert {line.removeprefix("On ") for line in lines if line.startswith("On ")} == {
        one.acts_on for one in CATALOGUE.values()
    }
    said = " ".join(result.stdout.split())
    assert "identity-now: the function stays as it is." in said
    assert "fullrank remedies NAME says" in said


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_remedy_is_said_in_full_within_80_columns(fullrank, name):
    result = fullrank("remedies", name)
    assert result.exit_code == 0, result.output
    assert max(map(cell_len, result.stdout.splitlines())) <= 80
    one = CATALOGUE[name]
    said = "".join(result.stdout.split())  # a word longer than its column is broken
    for words in (one.title, one.formula, one.cost, *one.limits, *one.papers, *one.addresses):
        assert "".join(words.split()) in said, words
    for parameter in one.parameters:
        assert "".join(f"{parameter.name} = ".split()) in said
        assert "".join(f"({parameter.range})".split()) in said
    assert f"screenSPEC--try'{name}" in said


def test_json_lists_all_of_them_and_nothing_else(fullrank):
    found = json.loads(fullrank("remedies", "--json").stdout)
    assert [one["name"] for one in found] == list(CATALOGUE)
    assert all(set(one) == FIELDS for one in found)
    assert all(set(each) == {"name", "says", "default", "accepts"} for one in found for each in one["parameters"])


def test_json_of_one_is_an_object_with_its_parameters(fullrank):
    found = json.loads(fullrank("remedies", "temperature", "--json").stdout)
    one = CATALOGUE["temperature"]
    assert set(found) == FIELDS
    assert found["exactness"] == one.exactness
    assert found["limits"] == list(one.limits)
    kind = found["parameters"][0]
    assert (kind["name"], kind["default"]) == ("kind", one.parameters[0].default)
    assert kind["accepts"] == one.parameters[0].range


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("center_attention", "'center-attention'"),
        ("xyzzy", "lists them"),
    ],
)
def test_an_unknown_name_is_one_sentence_with_names_like_it(fullrank, name, says):
    result = fullrank("remedies", name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"fullrank: '{name}' is no remedy")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_explains_a_failure_names_the_remedies_to_try(fullrank):
    from fullrank.remedies.candidates import CANDIDATES

    assert json.loads(fullrank("explain", "sinks", "--json").stdout)["candidates"] == list(CANDIDATES["sinks"])
    said = fullrank("explain", "sinks").stdout
    assert all(name in said for name in CANDIDATES["sinks"])
