"""The committed compatibility page says what is seen now."""

import pytest
from compatibility import HEAD, PAGE, line, lines
from families import FAMILIES, REFUSED


def test_the_page_has_one_line_for_every_family():
    assert list(lines()) == sorted(FAMILIES)
    head = HEAD.replace("{count}", str(len(FAMILIES))).replace("{refused}", str(len(REFUSED)))
    assert PAGE.read_text(encoding="utf-8").startswith(head)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_line_of_a_family_is_what_is_seen_now(family):
    assert lines()[family] == line(family)
