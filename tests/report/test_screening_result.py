"""A screening: ranked by loss and by nothing else, not ranked without training, and nothing lost on the way."""

import io
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


@pytest.mark.parametrize(
    ("one", "target", "share"),
    [
        (Restored("similarity", "", 0.9, 0.6, 0.3, 0.0), 0.3, 0.5),
        (Restored("similarity", "", 0.9, 0.3, 0.3, 0.0), 0.3, 1.0),
        (Restored("similarity", "", 0.9, 0.99, 0.3, 0.0), 0.3, -0.15),
        (Restored("similarity", "", 0.9, 0.1, 0.6, 0.0), 0.6, 1.0),  # tokens that differ more than at initialisation
        (Restored("rms", "", 9.0, 0.5, 1.0, None), 1.0, 1 - 0.5 / 8),
        (Restored("similarity", "", 0.2, 0.1, 0.3, 0.0), 0.3, None),  # nothing is missing
        (Restored("similarity", "", 0.9, 0.45, 0.9, 0.0), 0.0, 0.5),  # fresh weights stand where their reference does
        (Restored("similarity", "", 0.9, 0.45, None, 0.0), 0.0, 0.5),
        (Restored("similarity", "", 0.9, 0.45, 0.9, None), None, None),
        (Restored("similarity", "", 0.9, None, 0.3, 0.0), 0.3, None),
        (Restored("similarity", "", None, 0.9, 0.3, None), None, None),
    ],
)
def test_how_much_of_the_way_a_number_came(one, target, share):
    assert one.target == target
    assert one.share == (None if share is None else pytest.approx(share))


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
    assert "4 of 7 candidates are shown to help: residual-scale loses least, −1.07 [−1.14, −1.00]" in said
    assert "intervals of rezero and center-attention overlap its own" in said
    assert "layer-scale" not in said
    assert "chance of 2.77" in said


def test_what_loses_less_and_stays_at_chance_is_said_to():
    base = trained(BASE, 3.07, None)
    less, more = trained(Screened("rezero"), 3.03, (-0.04, -0.05, -0.03)), trained(Screened("b"), 2.2, (-0.9, -1, -0.8))
    stays = "at chance all the same: what helps to learn takes more steps to show."
    assert f"It stays {stays}" in Screening.of([base, less], steps=4).said
    assert f"They stay {stays}" in Screening.of([base, less, replace(less, variant="c")], steps=4).said
    assert stays not in Screening.of([base, less, more], steps=4).said  # one of them learns
    assert stays not in Screening.of([trained(BASE, 2.5, None), replace(more, trained=False)], steps=4).said


def test_where_none_helps_it_says_so():
    worse = trained(Screened("worse"), 2.8, (0.1, 0.05, 0.15))
    same = trained(Screened("same"), 2.69, (-0.01, -0.05, 0.03))
    made = Screening.of([trained(BASE, 2.7, None), worse, same], steps=150)
    assert made.helping == ()
    assert "None of the 2 candidates helps" in made.said
    assert "None of the 1 candidate restores" in Screening.of([BASE, Screened("x", restored=restored(0.97))]).said


def test_of_one_number_nothing_is_shown():
    alone = trained(Screened("alone"), 1.0, None)
    alone = replace(alone, change=LossChange(-1.7, None, None, 1, 1))
    assert Screening.of([trained(BASE, 2.7, None), alone], steps=9).helping == ()


def test_where_the_model_itself_diverges_what_trains_helps():
    made = Screening.of([trained(BASE, math.inf, None), trained(Screened("x"), 2.0, None)], steps=150)
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
    assert row.share == pytest.approx((0.98 - 0.35) / (0.98 - 0.31) - 2 * max(0, 0.31 - 0.35))


@pytest.mark.parametrize("steps", [0, 150])
def test_json_and_files_bring_everything_back(steps, tmp_path):
    made = screening(steps=steps)
    assert Screening.from_json(made.to_json()) == made
    assert Screening.load(made.save_json(tmp_path / "screening.json")) == made


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
