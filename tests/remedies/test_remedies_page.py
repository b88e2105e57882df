"""The committed page on remedies says what the catalogue says now."""

import re

import pytest
from remedies_page import PAGE, page

from fullrank.diagnosis.catalogue import FAILURES
from fullrank.remedies import CATALOGUE, asked_for
from fullrank.remedies.candidates import CANDIDATES, candidates_for


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_catalogue_says_now(text):
    # where this fails: python tests/remedies/remedies_page.py
    assert text == page()


def test_the_front_page_counts_them():
    assert f"\n{len(CATALOGUE)} remedies from the literature" in (PAGE.parent.parent / "README.md").read_text("utf-8")


def test_every_remedy_stands_once_in_the_first_table_and_has_one_entry(text):
    lines = re.findall(r"^\| [a-z ]+ \| \[([a-z-]+)\]\(#\1\) \|", text, re.MULTILINE)
    entries = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(lines) == len(entries) == len(CATALOGUE)
    assert set(lines) == set(entries) == set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_entry_has_every_parameter_and_limit_and_paper(text, name):
    entry = text.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    one = CATALOGUE[name]
    assert re.findall(r"^\| \*\*([a-z_]+)\*\* \|", entry, re.MULTILINE) == [each.name for each in one.parameters]
    assert len(re.findall(r"^- (?!\*\*)", entry, re.MULTILINE)) == len(one.limits)
    assert re.findall(r"arxiv\.org/abs/([\d.]+)", entry) == re.findall(r"arXiv (\d+\.\d+)", " ".join(one.papers))
    assert f"**Exactness.** {one.exactness}." in entry


def test_no_line_of_a_table_has_more_cells_than_its_head(text):
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_every_link_within_the_page_leads_to_an_entry(text):
    assert set(re.findall(r"\]\(#([a-z-]+)\)", text)) <= set(CATALOGUE)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_every_failure_names_candidates_that_exist_with_parameters_that_are_accepted(failure):
    named = CANDIDATES[failure.name]
    read = [asked_for(one, {})[0] for one in named]
    assert len({one.remedy.name for one in read}) == len(named)
    for text, one in zip(named, read, strict=True):
        assert str(one) == text  # what is written is what is meant: no default, and nothing rounded


def test_no_candidate_is_named_for_a_failure_that_there_is_not():
    assert set(CANDIDATES) == {failure.name for failure in FAILURES}


def test_candidates_of_several_failures_take_turns():
    assert candidates_for(["sinks", "numerics"], most=4) == ("learned-sink", "qk-norm", "position-gate", "softcap")
    assert candidates_for(["sinks", "sinks"], most=9) == CANDIDATES["sinks"]
    assert candidates_for(["no-such-failure"], most=9) == ()
    assert candidates_for([], most=9) == ()
