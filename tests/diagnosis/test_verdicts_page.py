"""The committed page on verdicts says what the catalogue and the thresholds say now."""

import re

from verdicts_page import PAGE, measured, page

from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.catalogue import FAILURES
from healthy.table import number


def test_the_page_is_what_the_code_says_now():
    # where this fails: python tests/diagnosis/verdicts_page.py
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_failure_and_every_threshold_has_a_line():
    lines = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines == [failure.name for failure in FAILURES] + list(THRESHOLDS)


def test_every_limit_was_held_against_healthy_models_at_the_value_it_has_now():
    # where this fails: python benchmarks/specificity.py, then python tests/diagnosis/verdicts_page.py
    assert {name: line.value for name, line in measured().items()} == {
        name: number(one.value) for name, one in THRESHOLDS.items()
    }


def test_what_must_be_asked_for_is_what_the_command_asks_for():
    lines = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    for failure in FAILURES:
        for option in re.findall(r"--(?:contexts|gradients|weights)", lines[failure.name]):
            assert option in failure.command
