"""Tokens on one line: a warning where every number agrees, a note where one huge token or channel may be all of it."""

from dataclasses import replace

import pytest
import torch
from depth_rows import evidence, over_depth

from fullrank.capture.events import StreamState
from fullrank.diagnosis import Evidence
from fullrank.diagnosis.rank_collapse_depth import FAILURE
from fullrank.diagnosis.single_direction import single_direction
from fullrank.measure.stream import StreamObserver
from fullrank.report.verdict import Severity

RANKS = (9.0, 8.0, 1.02, 2.5, 4.0)
NULL = 25.0


def ranks(*values, **options):
    return over_depth("centered_effective_rank", values, **options)


def line(**changed):
    """Rows of a stream that is one line after layer 2, one of them another or missing."""
    rows = {
        "rank": ranks(*RANKS),
        "no_first": ranks(*RANKS, scope="no-first"),
        "channels": over_depth("channel_entropy", [0.9] * 5),
        "dimensions": over_depth("intrinsic_dimension", [8.0, 8.0, 1.1, 2.0, 4.0]),
        "initial": ranks(9.0, 9.0, 9.0, 8.0, 8.0, source="initialisation"),
    }
    assert changed.keys() <= rows.keys()
    return [row for some in (rows | changed).values() for row in some]


def found(rows, **known):
    return single_direction(evidence(rows, **known), "encoder")


def test_tokens_on_one_line_are_a_warning_though_they_keep_their_energy():
    rows = [*line(), *over_depth("token_energy", [0.9, 0.8, 0.7, 0.7, 0.7])]
    (one,) = FAILURE.look(evidence(rows)).suspicions
    assert (one.layers, one.severity, one.tests, one.exceeded) == ((2,), Severity.WARN, (), True)
    assert "one direction alone: effective rank 1.02" in one.claim
    assert one.comparisons[0].against == "initialisation"


@pytest.mark.parametrize("values", [(9.0, 8.0, 1.6, 4.0), (2.0, 1.2, 1.2, 1.2), (9.0, 8.0, None, 4.0)])
def test_several_directions_or_few_tokens_are_no_line(values):
    assert found(line(rank=ranks(*values), no_first=[])) is None


def test_a_line_that_the_initialisation_has_too_is_none():
    assert found(line(initial=ranks(*RANKS, source="initialisation"))) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"no_first": ranks(9.0, 8.0, 6.0, 6.0, 6.0, scope="no-first")}, "a few tokens are all of it"),
        ({"no_first": ranks(9.0, 8.0, 6.0, 6.0, 6.0, scope="late")}, ""),  # the headline then: no line at all
        ({"channels": over_depth("channel_entropy", [0.9, 0.9, 0.1, 0.9, 0.9])}, "a few channels"),
        ({"channels": []}, "a few channels"),
        ({"dimensions": over_depth("intrinsic_dimension", [8.0] * 5)}, "differ along 8.00 dimensions"),
        ({"dimensions": over_depth("intrinsic_dimension", [1.9] * 5, stderr=0.1)}, "differ along 1.90 dimensions"),
        ({"dimensions": []}, "a few large tokens may be"),
        ({"initial": []}, "no initialisation to hold it against"),
    ],
)
def test_where_another_number_disagrees_or_is_missing_it_is_a_note_with_the_reason(changed, words):
    one = found(line(**changed))
    if not words:
        assert one is None
        return
    assert one is not None
    assert (one.severity, one.exceeded) == (Severity.NOTE, False)
    assert words in one.claim


def test_fresh_weights_are_held_against_the_null():
    rows = line(initial=[])
    known = evidence(rows, weights="fresh")
    with_null = Evidence(rows, known.about | {"nulls": {"encoder": {"centered_effective_rank": NULL}}}, weights="fresh")
    one = single_direction(with_null, "encoder")
    assert one is not None
    assert one.severity is Severity.WARN
    assert (one.comparisons[0].against, one.comparisons[0].expected) == ("null", NULL)
    without = single_direction(known, "encoder")
    assert without is not None
    assert without.severity is Severity.NOTE


def test_one_layer_that_a_huge_token_hides_is_no_reason_against_the_others():
    rank = ranks(9.0, 8.0, 1.02, 1.02, 1.02)
    without = ranks(9.0, 8.0, 7.0, 1.02, 1.02, scope="no-first")
    one = found(
        line(rank=rank, no_first=without, dimensions=over_depth("intrinsic_dimension", [8.0, 8.0, 8, 1.1, 1.1]))
    )
    assert one is not None
    assert (one.layers, one.severity) == ((3, 4), Severity.WARN)


def merged(value=1e-4, **options):
    return over_depth("token_energy", [0.95, 0.9, 0.8, value, value], **options)


def test_a_note_on_a_line_never_takes_the_place_of_a_collapse():
    note = line(initial=[])
    assert [one.severity for one in FAILURE.look(evidence(note, merged())).suspicions] == [Severity.WARN]
    (one,) = FAILURE.look(evidence(note, merged(), causal=True)).suspicions
    assert (one.severity, one.layers[0]) == (Severity.FAIL, 3)


def test_a_warning_on_a_line_stands_before_a_graver_collapse_and_for_one_that_is_not():
    apart = merged(0.5, source="initialisation")
    (one,) = FAILURE.look(evidence(line(), merged(), apart)).suspicions
    assert (one.severity, one.layers) == (Severity.WARN, (2,))
    both = FAILURE.look(evidence(line(), merged(), apart, causal=True)).suspicions
    assert [(one.severity, one.layers[0]) for one in both] == [(Severity.WARN, 2), (Severity.FAIL, 3)]


# ------------------------------------------------------------ measured


WIDTH = 64


def streams(change, *, causal):
    """What is said of a healthy stream of Gaussian tokens after a change of its last state."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(8, 32, WIDTH, generator=generator)
    rows = []
    for source, last in (("measured", change(X.clone(), generator)), ("initialisation", X)):
        observer = StreamObserver(causal=["encoder"] if causal else [])
        for layer, state in enumerate((X, last)):
            observer.see(StreamState("encoder", layer, "stream", "out", "", state))
        rows += [replace(row, source=source) for row in observer.rows()]
    return found(rows, causal=causal)


def on_a_line(X, generator):
    direction = torch.randn(WIDTH, generator=generator)
    return torch.randn(*X.shape[:2], 1, generator=generator) * direction + 1e-3 * X


def one_token(position):
    def change(X, _):
        X[:, position] *= 1e4
        return X

    return change


def two_tokens(X, _):
    X[:, 0] *= 1e4
    X[:, 20] = X[:, 0]
    return X


def one_channel(X, _):
    X[..., 5] *= 1e4
    return X


@pytest.mark.parametrize("causal", [False, True])
def test_a_measured_line_is_a_warning(causal):
    one = streams(on_a_line, causal=causal)
    assert one is not None
    assert (one.severity, one.layers) == (Severity.WARN, (1,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("change", [one_token(0), one_token(20), two_tokens, one_channel])
def test_a_measured_huge_token_or_channel_is_a_note_at_most(change, causal):
    one = streams(change, causal=causal)
    assert one is None or one.severity is Severity.NOTE
    if not (causal and change is not one_channel):
        assert one is not None  # so that the note's guards are what is tested


def test_a_huge_token_in_the_late_half_is_caught_by_its_neighbours():
    one = streams(one_token(20), causal=True)
    assert one is not None
    assert "neighbouring tokens differ along" in one.claim
