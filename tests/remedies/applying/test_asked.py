"""What is asked for in words is what is asked for in Python, and is written as it can be asked for again."""

import pytest

from fullrank.errors import RemedyError
from fullrank.remedies import asked_for


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("reduce-tokens?keep=0.9,0.7&windows=3,1", {"keep": (0.9, 0.7), "windows": (3, 1)}),
        ("reduce-tokens?keep=.5", {"keep": 0.5}),
        ("reduce-tokens?layers=(1, 3)", {"layers": (1, 3)}),
        ("reduce-tokens?layers=[1,3]", {"layers": [1, 3]}),
        ("reduce-tokens?method=merge&r=(2,)", {"method": "merge", "r": 2}),
        ("temperature?kind=log-context", {"kind": "log-context"}),
        ("rezero?start=.5", {"start": 0.5}),
    ],
)
def test_words_and_values_ask_for_the_same_and_what_is_written_asks_for_it_again(text, parameters):
    (asked,) = asked_for(text, {})
    assert asked == asked_for(text.split("?")[0], parameters)[0]
    assert asked_for(str(asked), {}) == (asked,)


@pytest.mark.parametrize("text", ["keep=0.9,two", "keep=0.9,,0.7", "windows=2.5,1", "keep=1,nan", "r=(2, 1"])
def test_what_are_no_such_numbers_is_refused(text):
    with pytest.raises(RemedyError, match=f"{text.split('=')[0]}=.* of reduce-tokens is not accepted"):
        asked_for(f"reduce-tokens?{text}", {})
