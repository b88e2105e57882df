"""What holds of every theory in the catalogue."""

import math

import pytest

from fullrank import Architecture
from fullrank.errors import TheoryError
from fullrank.metrics import VOCABULARY
from fullrank.theory.catalogue import THEORIES, chosen
from theory.theories_table import PAGE, page

PLAIN = Architecture(depth=3, width=64, heads=4, context=64)
ARCHITECTURES = {
    "encoder": PLAIN,
    "decoder": PLAIN.with_(mask="causal"),
    "skipless": PLAIN.with_(skip_scale=0.0, mlp_width=0),
    "bare": PLAIN.with_(norm="none", placement="none", activation="relu"),
    "post": PLAIN.with_(placement="post", activation="relu"),
    "batchnorm": PLAIN.with_(norm="batchnorm", placement="post", activation="identity", mask="full"),
}


def test_keys_are_different_and_the_page_lists_them_as_they_are():
    assert len({one.key for one in THEORIES}) == len(THEORIES)
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run python tests/theory/theories_table.py"


def test_a_string_is_one_key():
    assert chosen("noci") == chosen(["noci"])
    assert [one.key for one in chosen("noci")] == ["noci"]
    for wrong in ("nocy", "noci,cowsik", ""):
        with pytest.raises(TheoryError, match=f"names '{wrong}'; there are giorlandino_goldt, noci"):
            chosen(wrong)


@pytest.mark.parametrize("one", THEORIES, ids=lambda one: one.key)
def test_a_theory_gives_metrics_of_the_vocabulary_and_says_what_it_assumes(one):
    assert set(one.gives) <= set(VOCABULARY)
    assert one.title
    assert all(assumption.says and assumption.otherwise for assumption in one.assumes)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("one", THEORIES, ids=lambda one: one.key)
def test_where_it_speaks_its_rows_are_finite_of_what_it_gives_and_where_not_there_are_reasons(one, architecture):
    if one.fit(architecture) <= 0:
        assert one.reasons(architecture)
        return
    assert one.fit(architecture) <= 1
    assert one.reasons(architecture) == ()
    rows = one.rows(architecture)
    assert rows
    for row in rows:
        assert row.source == f"theory:{one.key}"
        assert row.stack == architecture.stack
        assert row.metric in one.gives
        assert 0 <= row.layer <= architecture.depth
        assert row.value is None or math.isfinite(row.value)
