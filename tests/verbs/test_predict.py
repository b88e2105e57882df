"""`predict`: rows in the schema of `examine`, ranked before any measurement, and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import fullrank
from fullrank import Architecture
from fullrank.errors import ArchitectureError, FullrankError, TheoryError
from fullrank.metrics import VOCABULARY
from fullrank.report import Report
from fullrank.theory.catalogue import THEORIES
from fullrank.verbs.predict import architecture_of

PLAIN = Architecture(depth=3, width=64, heads=4, context=64)


def decoder():
    return GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64))


def encoder():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=64, **sizes))


@pytest.fixture(scope="module", params=[decoder, encoder], ids=["decoder", "encoder"])
def both(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = request.param().eval()
    batch = {"input_ids": torch.randint(50, (2, 48), generator=torch.Generator().manual_seed(1))}
    measured = fullrank.examine(model, batch, spectrum=False, reference=False)
    return measured, fullrank.predict(model, batch)


def places(report, source=None):
    """Where the numbers of blocks stand; of what heads have, the metric and its place alone."""
    rows = [row for row in report.rows if source in (None, row.source) and row.site in ("stream", "attention")]
    return {(row.stack, row.layer, row.site, row.part, row.scope, row.metric) for row in rows}


def test_the_primary_theory_gives_numbers_at_places_where_examine_gives_them(both):
    measured, predicted = both
    assert predicted.primary == "theory:giorlandino_goldt"
    theory = places(predicted, predicted.primary)
    assert theory
    assert theory <= places(measured)


def test_other_theories_too_stand_at_places_that_examine_has(both):
    measured, predicted = both
    stream = {place for place in places(predicted) if place[2:4] == ("stream", "out")}
    gives = {place[-1] for place in places(measured)}
    assert {place for place in stream if place[-1] in gives} <= places(measured)


def test_rows_say_their_theory_and_their_metrics_are_in_the_vocabulary(both):
    _, predicted = both
    known = {f"theory:{one.key}": set(one.gives) for one in THEORIES}
    for row in predicted.rows:
        assert row.metric in VOCABULARY
        assert row.metric in known[row.source]
        assert row.n is None


def test_every_theory_is_in_the_standings_or_left_out_with_its_reasons():
    one = fullrank.predict(PLAIN).prediction
    standing, left = [s.key for s in one.standings], [s.key for s in one.left_out]
    assert sorted(standing + left) == sorted(theory.key for theory in THEORIES)
    assert all(each.because and all(each.because) for each in one.left_out)
    fits = [each.fit for each in one.standings]
    assert fits == sorted(fits, reverse=True)
    assert 0 < min(fits) <= max(fits) <= 1


def test_the_ranking_is_the_product_of_degrees_and_knows_no_measurement():
    one = fullrank.predict(PLAIN).prediction
    for standing in one.standings:
        product = 1.0
        for _, degree in standing.strained:
            product *= degree
        assert standing.fit == pytest.approx(product)
    # what is measured on a batch, and how surely, moves no assumption of the primary theory
    other = fullrank.predict(replace(PLAIN, correlation=0.3, correlation_stderr=0.05))
    assert other.primary == fullrank.predict(PLAIN).primary


def test_an_assumption_that_does_not_hold_leaves_a_theory_out_and_says_why():
    one = fullrank.predict(PLAIN.with_(norm="batchnorm")).prediction
    (left,) = [each for each in one.left_out if each.key == "giorlandino_goldt"]
    assert "its norm is taken over the batch" in left.because[0]
    assert one.primary != "giorlandino_goldt"


def test_only_the_theories_that_are_asked_for_speak():
    one = fullrank.predict(PLAIN, theories=["noci"])
    assert {row.source for row in one.rows} == {"theory:noci"}
    assert one.primary == "theory:noci"
    assert one.prediction.answers == ()


def test_the_report_survives_json_whole():
    one = fullrank.predict(PLAIN)
    assert Report.from_json(one.to_json()) == one


def test_theories_are_dotted_beside_a_measurement_in_colours_of_their_own(both):
    measured, predicted = both
    figure = measured.overlay(predicted, labels=["measured", "predicted"]).figure(
        "similarity", site="stream", part="out"
    )
    dashes = {trace.name.split(" · ")[0]: trace.line.dash for trace in figure.data}
    assert dashes == {"measured": "solid", "predicted": "dot"}
    assert len({trace.line.color for trace in figure.data}) == len(figure.data)


def test_what_heads_have_stands_as_their_mean_beside_what_theory_says_of_it(both):
    measured, predicted = both
    figure = measured.overlay(predicted, labels=["measured", "predicted"]).figure("normalized_entropy")
    (solid,) = [trace for trace in figure.data if trace.line.dash != "dot"]
    means = measured.pivot("normalized_entropy").mean(axis=1)
    assert list(solid.y) == pytest.approx(means.tolist(), rel=1e-4)


def test_predict_of_an_architecture_imports_neither_transformers_nor_pandas_nor_plotly():
    code = (
        "import sys, fullrank; from fullrank import Architecture; "
        "fullrank.predict(Architecture(depth=2, width=32, heads=2)); "
        "print([name for name in ('transformers', 'pandas', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------ refusals


def test_an_unknown_theory_is_answered_with_those_there_are():
    with pytest.raises(TheoryError, match="theories= names 'nocy'; there are ") as error:
        fullrank.predict(PLAIN, theories=["nocy"])
    assert all(one.key in str(error.value) for one in THEORIES)
    with pytest.raises(TheoryError, match="theories= names nothing"):
        fullrank.predict(PLAIN, theories=[])


def test_a_theory_that_is_asked_for_and_does_not_speak_says_why():
    with pytest.raises(TheoryError, match=r"names none that speaks of this architecture \(giorlandino_goldt: its norm"):
        fullrank.predict(PLAIN.with_(norm="batchnorm"), theories=["giorlandino_goldt"])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"context": 1}, "context=1 must be a whole number of 2 or more"),
        ({"context": 0}, "context=0 must be a whole number of 2 or more"),
        ({"std_q": -0.1}, "std_q=-0.1 must be 0 or a positive number"),
        ({"qk_std": -0.1}, "std_q=-0.1 must be 0 or a positive number"),
        ({"heads": 5}, "heads=5 do not divide width=64"),
        ({"depth": 0}, "depth=0 must be"),
        ({"activation": "swish"}, "activation='swish' must be one of 'identity', 'relu', 'gelu', 'silu', 'tanh'"),
        ({"norm": "none"}, "do not go together"),
        ({"correlation": -0.9}, "is impossible among 64 tokens"),
        ({"dephth": 2}, "'dephth' is no field of an architecture: it has residual_scale, "),
    ],
)
def test_impossible_architectures_are_answered_in_one_sentence(values, says):
    with pytest.raises(ArchitectureError) as error:
        PLAIN.with_(**values)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_context_below_two_is_refused_by_predict_itself():
    with pytest.raises(FullrankError, match="context=1"):
        fullrank.predict(PLAIN, context=1)


def test_what_is_no_architecture_is_refused_by_name():
    with pytest.raises(ArchitectureError, match="takes an Architecture, a torch module or a SPEC, and was given int"):
        fullrank.predict(7)


def test_a_context_that_is_given_is_the_architectures():
    assert architecture_of(PLAIN, context=99).context == 99
    assert architecture_of(PLAIN) is PLAIN
