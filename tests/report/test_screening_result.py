"""A screening: ranked by loss and by nothing else, not ranked without training, and nothing lost on the way."""

import io
import json
import math
from dataclasses import replace
from itertools import permutations

import pandas as pd
import pytest
from rich.console import Console

from fullrank.errors import TableError
from fullrank.report import LossChange, Restored, Screened, Screening
from report.screened_sample import restored, screening, trained

BASE = Screened("as it is", "as it is", restored=restored(0.98), identity_distance=0.7)


def shown(one, width, *, plain=False):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.copy()
    options.encoding = "ascii" if plain else "utf-8"
    for part in one.__rich_console__(console, options):
        console.print(part)
    return console.file.getvalue()


# ---------------------------------------------------------------- order


def test_trained_variants_are_ranked_by_loss_whatever_they_restored():
    good = trained(Screened("good", restored=restored(0.99), identity_distance=0.9), 1.0, (-1.7, -1.9, -1.5))
    idle = trained(Screened("idle", restored=restored(0.31), identity_distance=0.0), 2.0, (-0.7, -0.8, -0.6))
    base, lost = trained(BASE, 2.7, None), trained(Screened("lost", restored=restored(0.31)), math.inf, None)
    failed, untrained = Screened("no", failed=True, note="it does not fit."), Screened("later")
    for order in permutations([good, idle, base, lost]):
        made = Screening.of([failed, untrained, *order], steps=150)
        assert [row.variant for row in made.rows] == ["good", "idle", "as it is", "lost", "later", "no"]
        assert [made.rank(row) for row in made.rows] == [1, 2, 3, None, None, None]
        assert [row.variant for row in made.helping] == ["good", "idle"]


def test_without_training_there_is_no_rank_and_groups_keep_the_order_of_trying():
    names = ("a", "b", "c")
    for order in permutations(names):
        shares = {"a": 0.3, "b": 0.2, "c": 0.31}
        made = Screening.of([*(Screened(name, restored=restored(shares[name])) for name in order), BASE])
        assert not made.ranked
        assert [row.variant for row in made.groups()["restores"]] == list(order)
        assert all(made.rank(row) is None for row in made.rows)
        assert made.table["rank"].isna().all()
        assert made.helping == ()
        assert "ranked" in made.said


def test_equal_losses_share_a_rank():
    rows = [
        trained(replace(BASE, variant=name, kind=kind), 2.0, None)
        for name, kind in (("a", "remedy"), ("b", "as it is"))
    ]
    made = Screening.of(rows, steps=3)
    assert [made.rank(row) for row in made.rows] == [1, 1]


# ---------------------------------------------------------------- what is restored


LOW = {"healthy": "low", "tolerance": 0.04}


@pytest.mark.parametrize(
    ("one", "target", "share"),
    [
        (Restored("similarity", "", 0.9, 0.6, 0.3, 0.0, **LOW), 0.3, 0.5),
        (Restored("similarity", "", 0.9, 0.3, 0.3, 0.0, **LOW), 0.3, 1.0),
        (Restored("similarity", "", 0.9, 0.99, 0.3, 0.0, **LOW), 0.3, -0.15),
        (Restored("similarity", "", 0.9, 0.1, 0.6, 0.0, **LOW), 0.6, 1.0),  # tokens that differ more than they did
        (Restored("similarity", "", 0.9, -0.4, 0.6, 0.0, **LOW), 0.6, 1.0),  # and more than independent ones
        (Restored("similarity", "", 0.2, 0.1, 0.3, 0.0, **LOW), 0.3, None),  # nothing is missing
        (Restored("similarity", "", 0.9, 0.45, 0.9, 0.0, **LOW), 0.0, 0.5),  # fresh weights stand at their reference
        (Restored("similarity", "", 0.9, 0.45, None, 0.0, **LOW), 0.0, 0.5),
        (Restored("similarity", "", 0.9, 0.45, 0.9, None, **LOW), None, None),
        (Restored("similarity", "", 0.9, 0.45, 0.9, None, 0.0, **LOW), 0.0, 0.5),  # no null: the healthy end
        (Restored("similarity", "", 0.9, None, 0.3, 0.0, **LOW), 0.3, None),
        (Restored("similarity", "", None, 0.9, 0.3, None, **LOW), None, None),
        (Restored("similarity", "", 0.06, 0.2, 0.03, 0.0, **LOW), 0.0, 1 - 0.2 / 0.06),
        (Restored("residual", "", 0.2, 0.95, 0.6, 1.0, healthy="high"), 0.6, 1.0),
        (Restored("residual", "", 0.95, 0.97, 0.6, 1.0, healthy="high"), 0.6, None),
        (Restored("rms", "", 9.0, 0.5, 1.0, None), 1.0, 1 - 0.5 / 8),
        (Restored("rms", "", 1e4, 1e2, 1.0, scale="log"), 1.0, 0.5),
        (Restored("rms", "", 1e-4, 1e-2, 1.0, scale="log"), 1.0, 0.5),
        (Restored("rms", "", 1e4, 1e-6, 1.0, scale="log"), 1.0, -0.5),  # beyond it, further than it was before it
        (Restored("rms", "", 1.03, 9.0, 1.0, scale="log", tolerance=0.05), None, None),  # as at initialisation
        (Restored("elasticity_ratio", "", 1e-4, 3.0, 1.0, scale="log", healthy="high"), 1.0, 1.0),
    ],
)
def test_how_much_of_the_way_a_number_came(one, target, share):
    assert one.target == target
    assert one.share == (None if share is None else pytest.approx(share))


def test_what_vanished_to_nothing_is_no_number_of_order_one():
    gone = Restored("rms", "", 1e4, 0.0, 1.0, scale="log")
    assert gone.share < -5
    assert Restored("rms", "", 0.0, 0.0, 1.0, scale="log").share == 0
    assert Restored("rms", "", 0.0, 1.0, 1.0, scale="log").share == 1


def test_noise_around_the_null_and_being_healthier_than_the_reference_are_no_failure():
    """Tokens of a healthy model, similarity −.008, with .014 afterwards: there was nothing to restore."""
    healthy = Restored("similarity", "", -0.008, 0.014, 0.028, 0.015, healthy="low", tolerance=0.04)
    assert (healthy.share, healthy.missing) == (None, False)
    made = Screening.of(
        [BASE, Screened("x", restored=(healthy,)), Screened("y", restored=(replace(healthy, after=-0.05),))]
    )
    assert {row.group for row in made.candidates} == {"nothing to restore"}
    assert "No candidate could be judged by its numbers" in made.said


def of(metric, before, after, reference=None, **options):
    return Restored(metric, "decoder, last layer", before, after, reference, **options)


def test_the_failures_own_numbers_decide_and_likeness_does_not():
    likeness = of("similarity", 0.9, 0.2, 0.2, healthy="low")
    own = of("contrast_gain", 0.01, 0.02, end=1.0, healthy="high", failure="rank-collapse-width")
    assert Screened("x", restored=(likeness,)).group == "restores"
    assert Screened("x", restored=(own, likeness)).group == "does not restore"
    assert Screened("x", restored=(replace(own, after=0.9), replace(likeness, after=0.99))).group == "restores"
    alone = replace(own, end=None)
    assert Screened("x", restored=(alone, likeness)).group == "no reference"
    said = shown(Screening.of([BASE, Screened("x", restored=(alone, likeness))]), 140)
    assert "no reference: the failure's own number has no reference" in " ".join(said.split())


def test_a_failure_that_stays_is_not_hidden_by_others_that_are_undone():
    merged = of("similarity", 1.0, 0.92, end=0.0, healthy="low", failure="rank-collapse-depth")
    gradient = of("gradient_gain", 1e-4, 0.9, end=1.0, scale="log", failure="vanishing-or-exploding")
    queries = of("elasticity_ratio", 1e-6, 0.3, end=1.0, healthy="high", scale="log", failure="query-key-starvation")
    half = Screened("half", restored=(merged, gradient, queries))
    assert half.shares == pytest.approx(
        {"rank-collapse-depth": 0.08, "vanishing-or-exploding": 0.9886, "query-key-starvation": 0.9129}, abs=1e-3
    )
    assert half.share == pytest.approx(0.08)
    whole = Screened("whole", restored=(replace(merged, after=0.1), gradient, queries))
    none = Screened("none", restored=tuple(replace(one, after=0.999 * one.before) for one in half.restored))
    made = Screening.of([replace(BASE, restored=half.restored), half, whole, none])
    assert [(row.variant, row.group) for row in made.candidates] == [
        ("whole", "restores"),
        ("half", "restores in part"),
        ("none", "does not restore"),
    ]
    assert "1 of 3 candidates restores similarity, gradient_gain and elasticity_ratio: whole." in made.said
    assert (
        "In part half does: for vanishing-or-exploding and query-key-starvation, not for rank-collapse-depth."
        in made.said
    )


def test_where_the_failures_number_is_restored_and_likeness_is_not_it_is_said():
    likeness = of("similarity", 0.98, 0.97, healthy="low", end=0.0)
    own = of("elasticity_ratio", 0.1, 0.9, end=1.0, healthy="high", scale="log", failure="query-key-starvation")
    rows = [Screened("x", restored=(own, likeness)), Screened("y", restored=(own, replace(likeness, after=0.1)))]
    made = Screening.of([replace(BASE, restored=rows[0].restored), *rows])
    assert [row.group for row in made.candidates] == ["restores", "restores"]
    assert "2 of 2 candidates restore elasticity_ratio: x and y." in made.said
    assert "With x similarity stays away from where it should be." in made.said


def test_the_failures_own_numbers_have_columns_of_their_own_and_their_targets_are_said():
    own = of("max_logit", 200.0, 20.0, 10.0, scale="log", failure="numerics")
    other = of("max_abs", 7e4, 30.0, 12.0, scale="log", failure="numerics")
    likeness = of("similarity", 0.9, 0.2, 0.2, healthy="low")
    row = Screened("x", restored=(own, other, likeness), identity_distance=0.5)
    said = shown(Screening.of([replace(BASE, restored=row.restored), row]), 140)
    assert "200 → 20.0" in said
    assert "30.0" in said
    assert "0.900 → 0.200" in said
    assert said.index("200 → 20.0") < said.index("0.900 → 0.200")
    assert (
        "before and after: max_logit, decoder, last layer, the number of numerics (own initialisation 10.0, should"
        in said
    )


def test_what_could_not_be_read_or_failed_in_training_is_no_failure_to_restore():
    lost = (of("similarity", 0.9, None, 0.2, healthy="low"), of("residual", 0.1, None, 0.9))
    rows = {
        "unseen": Screened("unseen", restored=lost, note="no token attention was seen."),
        "blind": Screened("blind", stumbled="reading", note="could not be examined: it raised."),
        "full": Screened(
            "full", restored=restored(0.31), stumbled="training", note="failed in training: OutOfMemoryError"
        ),
        "no": Screened("no", failed=True),
        "good": Screened("good", restored=restored(0.31)),
    }
    made = Screening.of([BASE, *rows.values()])
    assert {row.variant: row.group for row in made.candidates} == {
        "unseen": "could not be read",
        "blind": "could not be read",
        "full": "failed in training",
        "no": "could not be applied",
        "good": "restores",
    }
    assert "The one candidate restores the profile: good. 4 others could not be judged by their numbers." in made.said
    assert "unseen: no token attention was seen." in " ".join(shown(made, 200).split())


def test_groups_say_what_became_of_a_variant():
    made = screening(steps=0)
    names = {group: [row.variant for row in rows] for group, rows in made.groups().items()}
    assert names == {
        "restores": ["center-attention", "residual-scale", "rezero", "layer-scale"],
        "does not restore": ["temperature"],
        "shows only in training": ["warm-up"],
        "could not be applied": ["registers"],
    }
    assert [row.variant for row in made.candidates if row.idle] == ["rezero", "layer-scale"]


# ---------------------------------------------------------------- what it says


def test_it_says_who_helps_and_whose_intervals_overlap():
    said = screening().said
    assert "4 of 6 candidates are shown to help: residual-scale loses least, −1.07 [−1.14, −1.00]" in said
    assert "intervals of rezero and center-attention overlap its own" in said
    assert "layer-scale" not in said
    assert "chance of 2.77" in said
    assert "If none of 5 did anything, 0.125 of them would be expected to be shown to help all the same." in said
    assert "1 other could not be trained." in said  # and is not counted among those that do not help


def test_of_one_training_nothing_is_shown_to_help():
    """The interval covers sequences; the luck of a training is not in it."""
    rows = [
        trained(BASE, 2.7, None),
        trained(Screened("a"), 2.0, (-0.7, -0.8, -0.6)),
        trained(Screened("b"), 2.9, (0.2, 0.1, 0.3)),
    ]
    several = Screening.of(rows, steps=9)
    once = Screening.of([replace(r, change=r.change and replace(r.change, seeds=1)) for r in rows], steps=9)
    assert [row.variant for row in several.helping] == ["a"]
    assert once.helping == ()
    assert [row.variant for row in once.losing_less] == ["a"]
    assert "shown to help" in several.said
    assert "shown to help" not in once.said
    assert (
        "In this one training a loses least of 2 candidates, −0.700 [−0.800, −0.600]; "
        "--seeds 3 says whether it repeats." in once.said
    )
    alone = Screening.of([once.as_it_is, once["b"]], steps=9)
    assert "In this one training the one candidate does not surely lose less" in alone.said


def test_who_has_the_smallest_loss_is_not_passed_over_for_one_that_is_surer():
    unsure, sure = trained(Screened("A"), 1.0, (-1.0, -2.5, 0.5)), trained(Screened("B"), 1.5, (-0.5, -0.6, -0.4))
    made = Screening.of([trained(BASE, 2.0, None), unsure, sure], steps=9)
    assert [made.rank(made[name]) for name in "AB"] == [1, 2]
    assert (
        "1 of 2 candidates is shown to help: A has the smallest loss, with an interval that holds 0; "
        "of those that surely lose less B loses least, −0.500 [−0.600, −0.400]." in made.said
    )


def test_without_a_chance_the_start_is_what_is_not_got_below():
    base = replace(trained(BASE, 1.9, None), trained=False)
    said = Screening.of([base, trained(Screened("x"), 1.0, (-0.9, -1, -0.8))], steps=3).said
    assert said.startswith("The model as it is does not get below its start: it ends at 1.90.")
    assert "chance" not in said


def test_what_loses_less_and_stays_at_chance_is_said_to():
    base = trained(BASE, 3.07, None)
    less, more = trained(Screened("rezero"), 3.03, (-0.04, -0.05, -0.03)), trained(Screened("b"), 2.2, (-0.9, -1, -0.8))
    stays = "at chance all the same: what helps to learn takes more steps to show."

    def said(*rows):
        return Screening.of(rows, steps=4, about={"chance": 3.0}).said

    assert f"It stays {stays}" in said(base, less)
    assert f"They stay {stays}" in said(base, less, replace(less, variant="c"))
    assert stays not in said(base, less, more)  # one of them learns
    assert stays not in said(trained(BASE, 2.5, None), replace(more, trained=False))


def test_where_none_helps_it_says_so():
    worse = trained(Screened("worse"), 2.8, (0.1, 0.05, 0.15))
    same = trained(Screened("same"), 2.69, (-0.01, -0.05, 0.03))
    made = Screening.of([trained(BASE, 2.7, None), worse, same], steps=150)
    assert made.helping == ()
    assert "None of the 2 candidates helps" in made.said
    assert "The one candidate does not help" in Screening.of([trained(BASE, 2.7, None), worse], steps=150).said
    assert "The one candidate does not restore" in Screening.of([BASE, Screened("x", restored=restored(0.97))]).said


@pytest.mark.parametrize("steps", [0, 3])
def test_where_there_is_no_candidate_none_is_counted(steps):
    base = trained(BASE, 2.7, None) if steps else BASE
    made = Screening.of([base], steps=steps)
    assert "No candidate was tried." in made.said
    assert "--steps" not in made.said
    said = Screening.of([base, Screened("x", failed=True)], steps=steps).said
    assert "The one candidate could not be" in said


def test_of_one_number_nothing_is_shown():
    alone = trained(Screened("alone"), 1.0, None)
    alone = replace(alone, change=LossChange(-1.7, None, None, 1, 1))
    assert Screening.of([trained(BASE, 2.7, None), alone], steps=9).helping == ()


def test_where_the_model_itself_diverges_what_trains_helps():
    made = Screening.of(
        [trained(BASE, math.inf, None), trained(Screened("x"), 2.0, None)], steps=150, about={"seeds": 3}
    )
    assert [row.variant for row in made.helping] == ["x"]
    assert "diverges at every learning rate tried" in made.said


def test_idle_networks_are_said_to_restore_every_profile():
    said = screening(steps=0).said
    assert "With rezero and layer-scale the network does next to nothing" in said
    assert "--steps" in said


# ---------------------------------------------------------------- numbers and files


def test_the_table_holds_every_variant_with_na_where_there_is_nothing():
    table = screening().table.set_index("variant")
    assert list(table["rank"].dropna()) == [1, 2, 3, 4, 5, 6]
    assert table.loc["residual-scale", "change"] == -1.07
    assert table.loc["rezero", "extra_parameters"] == 24
    assert pd.isna(table.loc["registers", "loss"])
    assert table.loc["registers", "note"].startswith("it adds image tokens")
    frame = screening().restored
    assert len(frame) == 14
    row = frame[(frame.variant == "center-attention") & (frame.metric == "similarity")].iloc[0]
    assert row.share == pytest.approx((0.98 - 0.35) / (0.98 - 0.31))


@pytest.mark.parametrize("steps", [0, 150])
def test_json_and_files_bring_everything_back(steps, tmp_path):
    made = screening(steps=steps)
    assert Screening.from_json(made.to_json()) == made
    assert Screening.load(made.save_json(tmp_path / "screening.json")) == made


def test_what_follows_from_the_rest_stands_in_the_json_and_is_not_read_back():
    made = screening()
    found = json.loads(made.to_json())
    assert found["said"] == made.said
    for row, line in zip(made.rows, found["screened"], strict=True):
        assert (line["rank"], line["group"], line["idle"]) == (made.rank(row), row.group, row.idle)
        assert line["share"] == row.share
        assert [one["target"] for one in line["restored"]] == [one.target for one in row.restored]
        line |= {"rank": 99, "group": "restores", "share": 7.0, "idle": True}
        for one in line["restored"]:
            one |= {"target": 3.0, "share": 7.0}
    found["said"] = "Nothing."
    assert Screening.from_json(json.dumps(found)) == made


@pytest.mark.parametrize(
    ("name", "value"), [("profiles", []), ("about", []), ("notes", "none"), ("steps", "9"), ("profiles", None)]
)
def test_parts_of_another_type_are_refused_in_one_sentence(name, value):
    found = json.loads(screening(steps=0).to_json()) | {name: value}
    with pytest.raises(TableError, match=f"{name} of the screening is of type {type(value).__name__}") as refused:
        Screening.from_json(json.dumps(found))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["{}", "nonsense", '{"screened": [], "schema": 9}', '{"screened": [3], "schema": 1}'])
def test_what_holds_no_screening_is_refused_in_one_sentence(text):
    with pytest.raises(TableError) as refused:
        Screening.from_json(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([BASE, Screened("x"), Screened("x")], {}, "more than once"),
        ([Screened("x")], {}, "exactly once"),
        ([BASE, replace(BASE, variant="again")], {}, "exactly once"),
        ([BASE], {"profiles": {"y": None}}, "no variant"),
        ([replace(BASE, loss=1.0)], {}, "trained variants only"),
        ([BASE], {"steps": -1}, "steps=-1"),
    ],
)
def test_what_is_no_screening_is_refused(rows, options, said):
    with pytest.raises(TableError, match=said):
        Screening.of(rows, **options)


def test_a_variant_is_found_by_name():
    assert screening()["rezero"].idle
    with pytest.raises(TableError, match="residual-scale"):
        screening()["rezerro"]


# ---------------------------------------------------------------- terminal and figures


@pytest.mark.parametrize("steps", [0, 150])
@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_the_terminal_shows_every_variant_and_no_line_is_too_long(steps, width):
    made = screening(steps=steps)
    said = shown(made, width)
    assert max(map(len, said.splitlines())) <= width
    assert all(row.variant in said for row in made.rows)
    assert made.said.split(":")[0] in " ".join(said.split())
    assert ("ranked by loss" in said) == bool(steps) or not steps
    for group in made.groups() if not steps else ():
        assert group in said
    if width == 140:
        assert "0.980 → 0.280" in said
        assert "changes-function" in said
    assert "it adds image tokens" in said


def test_a_plain_terminal_is_given_plain_signs():
    assert shown(screening(), 100, plain=True).isascii()


def test_differences_are_drawn_with_their_intervals_the_first_on_top():
    (trace,) = screening().figure().data
    assert list(trace.y)[::-1] == ["residual-scale", "rezero", "center-attention", "layer-scale", "temperature"]
    assert trace.x[-1] == -1.07
    assert trace.error_x.array[-1] == pytest.approx(0.07)
    assert trace.error_x.arrayminus[-1] == pytest.approx(0.07)
    with pytest.raises(TableError, match="nothing was trained"):
        screening(steps=0).figure()


def test_profiles_are_drawn_before_and_after_and_the_reference_is_dotted():
    made = screening()
    lines = {trace.name: trace for trace in made.figure("similarity").data}
    assert set(lines) == {*made.profiles, "own initialisation"}
    assert [name for name, trace in lines.items() if trace.line.dash == "dot"] == ["own initialisation"]
    for name, trace in lines.items():
        report = made.profiles["as it is"].reference if name == "own initialisation" else made.profiles[name]
        expected = report.pivot("similarity", site="stream", scope="late")["out"]
        assert list(trace.y) == pytest.approx(list(expected), rel=1e-5)
    heads = made.figure("normalized_entropy").data[0]
    mean = made.profiles[heads.name].pivot("normalized_entropy", scope="late").mean(axis=1)
    assert list(heads.y) == pytest.approx(list(mean.astype(float)), rel=1e-5)
    with pytest.raises(TableError, match="profile"):
        made.figure("nonsense")
