"""The table keeps every number, its uncertainty and its note through every format."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.errors import OutputError, TableError
from fullrank.table import COLUMNS, Row, Table, headline, in_context, without_context, write_atomically


def row(value=1.0, **changes):
    defaults = {"stack": "encoder", "layer": 1, "site": "stream", "part": "out", "metric": "similarity"}
    return Row(**{**defaults, "value": value, **changes})


@pytest.fixture
def table():
    return Table(
        [
            row(0.25, stderr=0.01, n=8),
            row(0.5, layer=2, n=8, exact=False),
            row(None, layer=3, note="all tokens are masked"),
            row(math.inf, layer=4),
            *(row(0.1 * h, site="attention", part="self", metric="entropy", head=h) for h in range(3)),
            *(row(0.2 * h, site="attention", part="self", metric="entropy", head=h, scope="late") for h in range(3)),
        ]
    )


def test_the_frame_has_exactly_the_twelve_columns_of_the_schema(table):
    assert tuple(table.frame.columns) == COLUMNS
    assert len(COLUMNS) == 12
    assert table.frame["head"].isna().sum() == 4
    assert str(table.frame["layer"].dtype) == "Int64"


def test_json_round_trip_keeps_every_row_bit_for_bit(table):
    assert Table.from_json(table.to_json()) == table


def test_parquet_round_trip_keeps_every_row_bit_for_bit(table, tmp_path):
    table.to_parquet(tmp_path / "t.parquet")
    assert Table.from_parquet(tmp_path / "t.parquet") == table


def test_another_schema_version_is_refused_in_one_sentence(table):
    document = json.loads(table.to_json()) | {"schema": 99}
    with pytest.raises(TableError, match="schema version 99 found; this fullrank reads 1"):
        Table.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "rows": [{"value": 1}]}'])
def test_text_that_is_no_table_is_refused(text):
    with pytest.raises(TableError):
        Table.from_json(text)


def test_pivot_gives_layers_by_heads_at_the_headline_scope(table):
    pivot = table.pivot("entropy")
    assert list(pivot.columns) == [0, 1, 2]
    assert pivot.loc[1, 2] == pytest.approx(0.4)
    assert table.pivot("entropy", scope="all").loc[1, 2] == pytest.approx(0.2)


def test_pivot_of_a_stream_metric_gives_layers_by_parts(table):
    assert list(table.pivot("similarity").index) == [1, 2, 3, 4]
    with pytest.raises(TableError, match="not in this table"):
        table.pivot("nonsense")


def test_a_number_may_stand_only_once():
    with pytest.raises(TableError, match="two rows for the same number"):
        Table([row(1.0), row(2.0)])


def test_a_missing_value_must_say_why():
    with pytest.raises(TableError, match="must say why"):
        row(math.nan)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.integers(1, 11))
def test_merging_equals_measuring_all_sequences_at_once(samples, cut):
    cut = min(cut, len(samples) - 1)

    def measured(values):
        n = len(values)
        mean = sum(values) / n
        stderr = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        return Table([row(mean, stderr=stderr, n=n)])

    merged = measured(samples[:cut]).merge(measured(samples[cut:]))
    whole = measured(samples)
    assert merged.rows[0].n == len(samples)
    assert merged.rows[0].value == pytest.approx(whole.rows[0].value, abs=1e-9)
    assert merged.rows[0].stderr == pytest.approx(whole.rows[0].stderr, abs=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_standard_error_missing_for_several_sequences_is_missing_in_the_union(order):
    tables = [Table([row(1.0, stderr=None, n=2)]), Table([row(4.0, stderr=0.5, n=4)])]
    merged = tables[order[0]].merge(tables[order[1]]).rows[0]
    assert (merged.value, merged.stderr, merged.n) == (3.0, None, 6)


def test_single_sequences_have_the_standard_error_between_them():
    merged = Table([row(1.0)]).merge(Table([row(3.0)])).rows[0]
    assert (merged.value, merged.stderr, merged.n, merged.exact, merged.note) == (2.0, 1.0, 2, True, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "shared_energy"},
        {"metric": "sequence_energy"},
        {"metric": "token_energy"},
        {"metric": "similarity_across"},
        {"metric": "similarity_standardized"},
        {"metric": "stable_rank", "scope": "samples"},
        {"metric": "stable_rank", "scope": "samples+no-sink"},
    ],
)
def test_a_number_of_a_whole_batch_is_not_exact_once_pooled(changes):
    one, two = (Table([row(value, stderr=0.1, n=n, **changes)]) for value, n in ((0.2, 3), (0.6, 1)))
    merged = one.merge(two).rows[0]
    assert merged.value == pytest.approx(0.3)
    assert not merged.exact
    assert merged.note == "pooled from several batches; measured together it may differ"
    assert one.merge(two).merge(two).rows[0].note == merged.note
    assert one.merge(Table()).rows[0] == one.rows[0]
    missing = Table([row(None, note="needs two sequences", **changes)])
    assert one.merge(missing).rows[0] == row(0.2, stderr=0.1, n=3, note="needs two sequences", **changes)


def test_positions_are_kept_where_batches_agree_and_never_averaged():
    first, again, other = (Table([row(at, metric="sink_position", n=2, head=0)]) for at in (0.0, 0.0, 4.0))
    assert first.merge(again).rows[0] == row(0.0, metric="sink_position", n=4, head=0)
    differ = first.merge(other)
    assert differ.rows[0].value is None
    assert differ.rows[0].note == "positions differ between the batches"
    assert differ.merge(other).rows[0] == first.merge(other, other).rows[0]  # later tables do not undo it
    assert differ.merge(other).rows[0].value is None


@pytest.mark.parametrize("scope", ["all", "samples"])
def test_of_largest_entries_the_largest_is_kept(scope):
    first, second, none = (
        Table([row(value, metric="max_abs", n=n, scope=scope, note="" if n else "none")])
        for value, n in ((3.0, 2), (8.0, 1), (None, 0))
    )
    merged = row(8.0, metric="max_abs", n=3, scope=scope)
    assert first.merge(second).rows[0] == second.merge(first).rows[0] == merged
    assert first.merge(none, second).rows[0] == row(8.0, metric="max_abs", n=3, scope=scope, note="none")


def test_the_headline_is_late_where_it_exists():
    assert headline({"all", "late"}) == "late"
    assert headline({"all", "no-sink"}) == "all"


@given(st.sampled_from(["all", "late", "late+no-sink", "no-first", "context", "a+context=b"]), st.integers(1, 10**9))
def test_a_scope_in_a_context_is_read_back_and_comes_after_every_whole_one(scope, context):
    assert without_context(in_context(scope, context)) == (scope, context)
    assert without_context(scope) == (scope, None)
    assert headline({in_context(scope, context), scope}) == scope


def test_writing_to_a_missing_directory_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_where_and_notes(table):
    assert len(table.where(metric="entropy", scope="late")) == 3
    assert list(table.notes["note"]) == ["all tokens are masked"]
    with pytest.raises(TableError, match="no columns"):
        table.where(colour="red")
