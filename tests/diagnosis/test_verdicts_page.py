"""The committed page on verdicts says what the catalogue and the thresholds say now."""

import re

from verdicts_page import PAGE, page

from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.catalogue import FAILURES


def test_the_page_is_what_the_code_says_now():
    # where this fails: python tests/diagnosis/verdicts_page.py
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_failure_and_every_threshold_has_a_line():
    lines = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines == [failure.name for failure in FAILURES] + list(THRESHOLDS)


def test_what_must_be_asked_for_is_what_the_command_asks_for():
    lines = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    for failure in FAILURES:
        for option in re.findall(r"--(?:contexts|gradients|weights)", lines[failure.name]):
            assert option in failure.command
