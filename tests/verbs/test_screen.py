"""screen: candidates, groups and ranks, the same start for all, and a model that is returned as it came."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fullrank
from fullrank.errors import FullrankError, RemedyError, TrialError
from fullrank.metrics import VOCABULARY
from fullrank.remedies import CATALOGUE
from fullrank.remedies.candidates import candidates_for
from fullrank.report import Screening
from fullrank.report.screened import Screened
from fullrank.trials import RECOMMENDATIONS
from fullrank.verbs.restored import _BY_FAILURE, _SCALES, compared, numbers_of, unread
from fullrank.verbs.screen_arguments import joined
from fullrank.zoo import Transformer, TransformerConfig
from untouched import changes, everything

FAST = {"steps": 2, "rates": (1e-3,), "size": 4}


def ids(size=4, tokens=12, words=24, seed=0):
    return torch.randint(words, (size, tokens), generator=torch.Generator().manual_seed(seed))


BATCH = {"input_ids": ids()}


def zoo(**options):
    sizes = {"depth": 2, "width": 16, "heads": 2, "mlp_width": 32, "vocabulary": 24, "context": 16}
    return Transformer(TransformerConfig(**(sizes | {"kind": "decoder"} | options)), seed=0)


def gpt2(dropout=0.1):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 16}
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes, **rates))


def touched(before, model):
    """Names of what is not as it was; values are written and written back where weights are trained or set."""
    return [what for what in changes(before, everything(model)) if what != "versions"]


@pytest.fixture
def stir():
    """Gradients, training flags and a random state that somebody would miss."""

    def run(model):
        model.train()
        next(iter(model.children())).eval()
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.full_like(parameter, 0.5)
        return everything(model)

    return run


@pytest.mark.parametrize("make", [zoo, gpt2])
def test_the_model_comes_back_bit_for_bit_from_examining_repairing_and_training(make, stir):
    model = make()
    before = stir(model)
    tried = ["attn-scale?start=0.5", "scaled-init", "layernorm-scaling + value-residual", "entropy-regulariser"]
    made = fullrank.screen(model, BATCH, remedies=tried, recommendations=["warm-up"], **FAST)
    assert touched(before, model) == []
    assert {row.variant for row in made.rows} == {"as it is", *tried, "warm-up"}
    assert not [row.variant for row in made.rows if row.failed]


def test_a_candidate_that_cannot_be_applied_is_listed_with_its_reason_and_the_others_go_on(stir):
    model = zoo()
    before = stir(model)
    made = fullrank.screen(model, BATCH, remedies=["registers", "attn-scale + deepnorm", "residual-scale"])
    assert touched(before, model) == []
    for name, reason in (("registers", "reads no images"), ("attn-scale + deepnorm", "deepnorm")):
        assert made[name].failed
        assert reason in made[name].note
        assert (made[name].restored, made[name].loss) == ((), None)
        assert made[name].group == "could not be applied"
    assert not made["residual-scale"].failed


class Stumbling(nn.Module):
    """Fails in the forward of a number."""

    def __init__(self, model, at, error=RuntimeError):
        super().__init__()
        self.model, self.left, self.error = model, at, error

    def forward(self, input_ids):
        counts = vars(self)
        counts["left"] -= 1
        if counts["left"] == 0:
            raise self.error("the forward stumbled")
        return self.model(input_ids)


@pytest.fixture(scope="module")
def forwards():
    """How many forwards a screening takes."""
    model = Stumbling(zoo(depth=1), 0)
    fullrank.screen(model, BATCH, remedies=["attn-scale?start=0.5"], **FAST)
    return -model.left


@pytest.mark.slow
@pytest.mark.parametrize("error", [TrialError, RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_what_fails_in_the_training_of_a_candidate_is_noted_and_undone_and_the_others_go_on(forwards, stir, error):
    model = Stumbling(zoo(depth=1), forwards, error)  # in its last forward, that of judging the candidate
    before = stir(model)
    made = fullrank.screen(model, BATCH, remedies=["attn-scale?start=0.5", "residual-scale"], **FAST)
    row = made["attn-scale?start=0.5"]
    assert (row.failed, row.stumbled, row.group, row.loss) == (False, "training", "failed in training", None)
    kind = "" if error is TrialError else f"{error.__name__}: "
    assert row.note == f"failed in training: {kind}the forward stumbled"
    assert row.restored[0].after is not None  # it was examined before
    assert made["residual-scale"].loss is not None
    assert made.rank(row) is None
    assert "1 other could not be trained" in made.said
    assert [what for what in touched(before, model) if what != "attributes"] == []


@pytest.mark.slow
def test_the_model_comes_back_bit_for_bit_wherever_a_forward_raises(forwards, stir):
    """As it is nothing can be said without it; of a candidate it is noted where it was."""
    assert forwards > 12
    remedies, places = ["attn-scale?start=0.5"], set()
    for share in (0.05, 0.4, 0.6, 0.8, 1.0):  # of examining and training as it is, of applying, of both again
        model = Stumbling(zoo(depth=1), round(share * forwards))
        before = stir(model)
        try:
            row = fullrank.screen(model, BATCH, remedies=remedies, **FAST)[remedies[0]]
        except RuntimeError as reason:
            assert str(reason) == "the forward stumbled"
            places.add("as it is")
        else:
            assert "the forward stumbled" in row.note
            places.add("applying" if row.failed else row.stumbled)
        assert [what for what in touched(before, model) if what != "attributes"] == [], share
    assert places >= {"as it is", "training"}


def test_an_interrupt_in_the_training_of_a_candidate_passes_and_the_model_is_as_it_was(forwards, stir):
    model = Stumbling(zoo(depth=1), forwards, KeyboardInterrupt)
    before = stir(model)
    with pytest.raises(KeyboardInterrupt):
        fullrank.screen(model, BATCH, remedies=["attn-scale?start=0.5"], **FAST)
    assert [what for what in touched(before, model) if what != "attributes"] == []


@pytest.mark.slow
def test_a_candidate_under_which_the_stack_is_not_seen_could_not_be_read_and_the_reason_is_its_reports(deep):
    _, _, made = deep
    before = made.profiles["as it is"]
    said = "stack backbone: no token attention was seen in its 2 blocks."
    notes = [*before.about.get("notes", ()), said]
    elsewhere = before.rows.map(lambda row: replace(row, stack="backbone"))
    after = replace(before, rows=elsewhere, about={**before.about, "notes": notes})
    numbers = numbers_of(before)
    row = Screened("x", restored=compared(numbers, before, after))
    assert row.group == "could not be read"
    assert all(one.after is None for one in row.restored)
    assert unread(numbers, before, after) == said
    assert unread(numbers, before, before) == ""
    assert "could not be read" in unread(numbers, before, replace(after, about=before.about))


def test_an_interrupt_in_the_middle_of_a_candidate_leaves_nothing_behind(stir):
    model = zoo()
    before = stir(model)

    def stop(what, share):
        if what == "residual-scale":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fullrank.screen(model, BATCH, remedies=["attn-scale", "residual-scale"], progress=stop)
    assert touched(before, model) == []


@pytest.fixture(scope="module")
def deep():
    """A deep post-norm encoder, what examining says of it, and what is tried without naming a remedy."""
    model = zoo(kind="encoder", placement="post", depth=12)
    report = fullrank.examine(model, BATCH, spectrum=False, gradients=True, probes=1)
    return model, report, fullrank.screen(model, BATCH)


def test_without_names_the_candidates_are_those_of_its_verdicts(deep):
    _, report, made = deep
    failures = [one.name for one in sorted(report.verdicts, key=lambda one: -one.severity.rank)]
    assert failures, "this model was to have a verdict"
    assert made.about["verdicts"] == list(dict.fromkeys(failures))
    assert made.about["chosen"] == "named by the verdicts"
    assert {row.variant for row in made.candidates} == set(candidates_for(failures, most=6))
    assert 0 < len(made.candidates) <= 6


def test_the_verdicts_say_which_remedies_and_which_command(deep):
    _, report, _ = deep
    for verdict in report.verdicts:
        assert verdict.candidates == candidates_for([verdict.name], most=9)
        assert verdict.screen.startswith("fullrank screen ")


def test_numbers_are_those_of_an_examination_before_and_of_the_repaired_model(deep):
    model, _, made = deep
    row = next(row for row in made.candidates if not row.failed)
    after = _last(fullrank.examine(model, BATCH, spectrum=False, reference=False))
    similarity = next(one for one in row.restored if one.metric == "similarity")
    assert similarity.before == pytest.approx(after, rel=1e-6)
    with fullrank.repair(model, row.variant, batch=BATCH):
        after = _last(fullrank.examine(model, BATCH, spectrum=False, reference=False))
    assert similarity.after == pytest.approx(after, rel=1e-6)
    assert made.as_it_is.identity_distance == pytest.approx(
        _last(made.profiles["as it is"], "identity_distance"), rel=1e-6
    )


def _last(report, metric="similarity"):
    rows = [row for row in report.rows if (row.metric, row.site, row.part) == (metric, "stream", "out")]
    found = {row.scope: row.value for row in rows if row.layer == max(row.layer for row in rows)}
    return found["late"] if "late" in found else found["all"]


def test_without_steps_it_is_grouped_and_not_ranked(deep):
    _, _, made = deep
    assert isinstance(made, Screening)
    assert not made.ranked
    assert all(row.loss is None and made.rank(row) is None for row in made.rows)
    assert sum(map(len, made.groups().values())) == len(made.candidates)
    assert "nothing is ranked" in made.said
    assert made.helping == ()


def test_a_remedy_that_does_nothing_says_so_and_one_that_empties_the_blocks_is_next_to_the_identity(deep):
    model, _, _ = deep
    made = fullrank.screen(model, BATCH, remedies=["attn-scale", "rezero"])
    assert made["attn-scale"].group == "shows only in training"
    assert made["rezero"].idle
    assert made["rezero"].identity_distance < 0.01 < made.as_it_is.identity_distance
    likeness = next(one for one in made["rezero"].restored if one.metric == "similarity")
    assert likeness.share > 0.9  # as it does nothing
    assert "With rezero the network does next to nothing, which restores every profile." in made.said


def test_the_failures_own_numbers_come_first_and_decide(deep):
    _, report, made = deep
    gravest = max(report.verdicts, key=lambda one: one.severity.rank)
    for row in made.candidates:
        assert not row.restored or row.restored[0].failure == gravest.name
        assert row.deciding == tuple(one for one in row.restored if one.failure)
    assert all(one.metric in VOCABULARY for one in made.as_it_is.restored)


@pytest.mark.parametrize("metric", sorted({metric for rows in _BY_FAILURE.values() for metric, *_ in rows}))
def test_every_number_says_which_end_is_healthy_within_its_range(metric):
    low, high = VOCABULARY[metric].range
    scale = _SCALES[metric]
    assert 0 < scale.tolerance(metric) <= 0.05
    assert scale.end is None or low <= scale.end <= high
    assert scale.scale == "linear" or (low, high) in {(0.0, math.inf), (1.0, math.inf), (-math.inf, math.inf)}
    assert scale.healthy != "low" or scale.end != high
    assert scale.healthy != "high" or scale.end != low


def test_the_same_seeds_and_order_for_all_so_that_what_does_nothing_differs_by_nothing():
    """A temperature of 1 that is not trained: the same losses, also with dropout."""
    made = fullrank.screen(
        gpt2(), BATCH, remedies=["temperature?learnable=false", "orthogonal-init"], seeds=(0, 1), steps=3, rates=(3e-3,)
    )
    idle, other = made["temperature?learnable=false"], made["orthogonal-init"]
    assert idle.change.mean == pytest.approx(0, abs=1e-6)
    assert (idle.change.seeds, idle.change.sequences) == (2, 64)
    assert idle.loss == pytest.approx(made.as_it_is.loss, abs=1e-6)
    assert abs(other.change.mean) > 1e-4
    again = fullrank.screen(gpt2(), BATCH, remedies=["orthogonal-init"], seeds=(0, 1), steps=3, rates=(3e-3,))
    assert again["orthogonal-init"].loss == other.loss


def test_with_steps_it_is_ranked_by_loss_and_by_nothing_else():
    made = fullrank.screen(zoo(), BATCH, remedies=["residual-scale", "rezero"], steps=4, rates=(1e-3, 1e-2), size=4)
    losses = [row.loss for row in made.rows]
    assert losses == sorted(losses)
    assert [made.rank(row) for row in made.rows] == [1, 2, 3]
    assert made.ranked
    for row in made.candidates:
        assert row.change.mean == pytest.approx(row.loss - made.as_it_is.loss, abs=1e-9)
        assert row.change.low <= row.change.mean <= row.change.high
        assert row.seconds_ratio > 0
        assert row.learning_rate > 0
    assert made.as_it_is.change is None
    assert made.about["chance"] == pytest.approx(math.log(16))
    assert made.about["seeds"] == 1
    assert "next" in made.about["task"]


@pytest.mark.slow
def test_recommendations_stand_in_the_same_ranking_and_all_of_them_where_none_is_named():
    made = fullrank.screen(zoo(), BATCH, remedies=["residual-scale"], recommendations=None, **FAST)
    plain = {row.variant: row for row in made.rows if row.kind == "recommendation"}
    assert set(plain) == {one.name for one in RECOMMENDATIONS}
    assert all(row.loss is not None or row.failed for row in plain.values())
    third = plain["learning-rate/3"]
    assert third.learning_rate == pytest.approx(made.as_it_is.learning_rate / 3)
    assert third.parameters == "η → η / 3"


def test_data_of_ones_own_with_a_loss_of_ones_own():
    data = [{"input_ids": ids(seed=number)} for number in range(6)]
    made = fullrank.screen(
        zoo(),
        BATCH,
        remedies=["residual-scale"],
        data=data,
        loss=lambda model, batch: model(**batch).logits.square().mean(),
        steps=3,
        rates=(1e-3,),
    )
    assert made.about["task"] == "your data"
    assert made.about["chance"] is None
    base = made.as_it_is.loss
    assert 0 < base < zoo()(**data[-1]).logits.square().mean().item()  # held out, and trained on
    assert made["residual-scale"].change.sequences == 4


def test_labels_bring_the_models_own_loss():
    data = [{"input_ids": ids(seed=number), "labels": ids(seed=number)} for number in range(8)]
    made = fullrank.screen(gpt2(), BATCH, remedies=["residual-scale"], data=data, steps=3, rates=(1e-3,))
    assert made.as_it_is.loss == pytest.approx(math.log(24), abs=0.4)


@pytest.mark.slow
def test_a_penalty_is_trained_on_once_and_not_counted():
    plain = fullrank.screen(zoo(), BATCH, remedies=["rank-regulariser?weight=0.0"], **FAST)
    assert plain["rank-regulariser?weight=0.0"].change.mean == pytest.approx(0, abs=1e-6)
    heavy = fullrank.screen(zoo(), BATCH, remedies=["rank-regulariser?weight=100"], **FAST)
    row = heavy["rank-regulariser?weight=100"]
    assert row.loss < 10  # without the penalty, which is of the order of 100
    assert abs(row.change.mean) > 1e-5


def test_several_together_are_what_they_are_one_after_the_other():
    made = fullrank.screen(zoo(), BATCH, remedies=["residual-scale + center-attention", "residual-scale"])
    row = made["residual-scale + center-attention"]
    assert row.exactness == "init-only + changes-function"
    assert row.parameters == "residual-scale; center-attention"
    model = zoo()
    with fullrank.repair(model, ["residual-scale", "center-attention"], batch=BATCH):
        expected = _last(fullrank.examine(model, BATCH, spectrum=False, reference=False))
    assert row.restored[0].after == pytest.approx(expected, rel=1e-6)
    assert row.restored[0].after != pytest.approx(made["residual-scale"].restored[0].after, rel=1e-3)


def test_without_a_verdict_nothing_is_tried_and_it_is_said():
    made = fullrank.screen(zoo(), BATCH)
    assert made.about["verdicts"] == []
    assert made.candidates == ()
    assert any("No verdict names a failure" in note for note in made.notes)
    assert len(made) == 1


def test_what_it_is_about_and_what_is_kept():
    made = fullrank.screen(zoo(), BATCH, remedies=["residual-scale"])
    assert set(made.about) >= {"model", "verdicts", "chosen", "seconds", "versions", "stacks"}
    assert made.about["chosen"] == "asked for"
    assert set(made.profiles) == {"as it is", "residual-scale"}
    assert Screening.from_json(made.to_json()).table.equals(made.table)
    assert made["residual-scale"].exactness == CATALOGUE["residual-scale"].exactness
    assert made["residual-scale"].extra_parameters == 0


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (RemedyError, {"remedies": ["residual-scales"]}, "did you mean 'residual-scale'"),
        (RemedyError, {"remedies": ["residual-scale + residual-scale"]}, "residual-scale is named twice"),
        (RemedyError, {"remedies": ["attn-scale?start=1e9"]}, "start=1000000000.0 of attn-scale is not accepted"),
        (TrialError, {"steps": -1}, "steps=-1 must not be negative"),
        (TrialError, {"data": [BATCH]}, "give steps= too"),
        (TrialError, {"recommendations": None}, "give steps= too"),
        (TrialError, {"recommendations": ["tea"], "steps": 2}, "there is no recommendation 'tea'"),
        (TrialError, {"data": [], "steps": 2}, "data is empty"),
        (TrialError, {"rates": (0.0,), "steps": 2}, "expected different positive numbers"),
        (TrialError, {"rates": 1e-3, "steps": 2}, "rates=0.001 is no list; write it as rates=(1e-3, 3e-3)."),
        (TrialError, {"rates": (), "steps": 2}, "rates is empty"),
        (TrialError, {"rates": (1e-3, "fast"), "steps": 2}, "expected different positive numbers"),
        (TrialError, {"seeds": 3, "steps": 2}, "seeds=3 is no list; write it as seeds=(0, 1, 2)."),
        (TrialError, {"seeds": (), "steps": 2}, "seeds is empty"),
        (TrialError, {"seeds": (1, 1), "steps": 2}, "hold one twice"),
        (TrialError, {"seeds": (0.5,), "steps": 2}, "seeds=0.5 is no whole number"),
        (TrialError, {"steps": 2.5}, "steps=2.5 is no whole number; 0 trains nothing."),
        (TrialError, {"steps": True}, "steps=True is no whole number"),
        (TrialError, {"size": 0, "steps": 2}, "size=0 must not be below 1."),
        (TrialError, {"recommendations": "tea", "steps": 2}, "there is no recommendation 'tea'"),
        (RemedyError, {"remedies": []}, "remedies= names none; leave it out"),
        (RemedyError, {"remedies": {}}, "remedies= names none; leave it out"),
        (RemedyError, {"remedies": 3}, "remedies= takes a name, a list of names or a mapping"),
        (RemedyError, {"remedies": [3]}, "a remedy is named by text, and int was given"),
        (RemedyError, {"remedies": {"attn-scale": 3}}, "names no remedy with a mapping of its parameters"),
    ],
)
def test_bad_input_is_one_sentence_and_the_model_untouched(kind, options, says, stir):
    model = zoo(depth=1)
    before = stir(model)
    with pytest.raises(kind, match=re.escape(says)) as caught:
        fullrank.screen(Stumbling(model, 1) if "data" not in options else model, BATCH, **options)  # before any forward
    assert isinstance(caught.value, FullrankError)
    assert "\n" not in str(caught.value)
    assert touched(before, model) == []


def test_a_plus_joins_names_and_is_left_alone_in_numbers():
    assert [str(one) for one in joined("residual-scale?alpha=1e+0")] == ["residual-scale"]
    assert joined("residual-scale?alpha=5e-1")[0].parameters["alpha"] == 0.5
    two = joined("residual-scale?alpha=2e+0+rezero")
    assert [one.remedy.name for one in two] == ["residual-scale", "rezero"]
    assert two[0].parameters["alpha"] == 2


def test_remedies_are_named_as_in_repair():
    alone = fullrank.screen(zoo(depth=1), BATCH, remedies="residual-scale?alpha=5e-1")
    given = fullrank.screen(zoo(depth=1), BATCH, remedies={"residual-scale": {"alpha": 0.5}, "rezero": {}})
    assert [row.variant for row in alone.candidates] == ["residual-scale?alpha=5e-1"]
    assert {row.variant for row in given.candidates} == {"residual-scale?alpha=0.5", "rezero"}
    assert alone.candidates[0].restored == given["residual-scale?alpha=0.5"].restored
    made = fullrank.screen(zoo(depth=1), BATCH, remedies="rezero", recommendations="warm-up", **FAST)
    assert {row.variant for row in made.candidates} == {"rezero", "warm-up"}


def test_what_is_no_model_is_refused():
    with pytest.raises(RemedyError, match="screen takes a torch module or a SPEC, and was given dict"):
        fullrank.screen({})


def test_a_subject_of_a_spec_is_screened_with_its_own_batch():
    spec = "arch:gpt2?n_layer=1&n_embd=16&n_head=2&vocab_size=24&n_positions=16"
    made = fullrank.screen(spec, remedies=["residual-scale"])
    assert made.about["model"] == spec
    assert not made["residual-scale"].failed
