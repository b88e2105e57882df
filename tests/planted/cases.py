"""Planted and clean cases in three parts: limits were set on the first, and the others run once they were frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import fullrank
from fullrank.report.verdict import Severity
from planted import faults
from planted.trained import ARCHITECTURES, HALVES, HEADS, WIDTH, Batch, fresh, trained

AT_ONCE: Final = {"gradients": True, "weights": True, "spectrum": False}

FOLLOWS: Final[dict[str, tuple[str, ...]]] = {
    # tokens that are one: nothing to choose among, so heads average and write the same, and blocks have nothing to turn
    "drawn_together": (
        "query-key-starvation",
        "averaging-heads",
        "redundant-heads",
        "dead-depth",
        "numerics",
        "at-the-floor",
    ),
    "shared_direction": (
        *("query-key-starvation", "averaging-heads", "redundant-heads", "dead-depth", "numerics", "at-the-floor"),
        "vanishing-or-exploding",
    ),
    "weak_skips": ("query-key-starvation", "redundant-heads", "numerics", "at-the-floor", "vanishing-or-exploding"),
    # a stream that is as large as float16 can hold has exploded, and later blocks write next to nothing beside it
    "near_overflow": ("vanishing-or-exploding", "dead-depth"),
    # a frozen softmax hands no gradient to queries and keys
    "frozen_softmax": ("query-key-starvation",),
    # without queries and keys heads average
    "tiny_queries": ("averaging-heads",),
}
"""What a fault entails, beside its own name: true, and neither right nor wrong when a table is made."""

FAILURE_OF: Final = {
    "duplicated_heads": "redundant-heads",
    "undrawn_queries": "query-key-starvation",
    "frozen_queries": "query-key-starvation",
    "tiny_queries": "query-key-starvation",
    "identities": "dead-depth",
    "drawn_together": "rank-collapse-depth",
    "shared_direction": "rank-collapse-depth",
    "weak_skips": "rank-collapse-depth",
    "frozen_softmax": "entropy-collapse",
    "near_overflow": "numerics",
    "without_beginning": "sinks",
}

ONSETS: Final = ("drawn_together", "shared_direction", "near_overflow")
"""Faults that reach from a layer to the end: the verdict must begin there. Others must name no layer beside theirs."""


@dataclass(frozen=True)
class Case:
    """One model and one batch, with one fault or none.

    Attributes:
        half: one of `HALVES`.
        architecture: of `trained.ARCHITECTURES`.
        seed: of the model.
        batch: seed of the documents.
        fault: of `FAILURE_OF`; empty where nothing is planted.
        layers: where it is planted.
        options: of the fault, as it takes them.
        fresh: whether the model is at its initialisation, with `options` as its sizes.
    """

    half: str
    architecture: str
    seed: int
    batch: int
    fault: str = ""
    layers: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    fresh: bool = False

    @property
    def failure(self) -> str:
        return FAILURE_OF.get(self.fault, "")

    @property
    def words(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.options)
        what = f"{self.fault} {', '.join(map(str, self.layers))}" if self.fault else "clean"
        state = "fresh" if self.fresh else "trained"
        return f"{self.architecture} {self.seed} ({state}), batch {self.batch}: {what} {sizes}".rstrip()


@dataclass(frozen=True)
class Outcome:
    """What was said of a case.

    Attributes:
        case: which.
        layers: where the fault truly is.
        verdicts: name, severity and layers of each.
        claims: of the same.
        weights: trained or fresh, as the report says.
        clear: what was found clear.
        unchecked: what was not checked.
        seconds: of examining.
    """

    case: Case
    layers: tuple[int, ...]
    verdicts: tuple[tuple[str, str, tuple[int, ...]], ...]
    claims: tuple[str, ...] = ()
    weights: str = ""
    clear: tuple[tuple[str, str], ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def said(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Verdicts of weight: warnings and failures."""
        return [verdict for verdict in self.verdicts if verdict[1] != Severity.NOTE]

    @property
    def right(self) -> bool:
        """Planted: the failure is named where it is. Clean: no failure, one warning at most."""
        if not self.case.failure:
            return len(self.said) <= 1 and all(severity != Severity.FAIL for _, severity, _ in self.said)
        return any(name == self.case.failure and self.placed(layers) for name, _, layers in self.said)

    def placed(self, named: Sequence[int]) -> bool:
        if self.case.fault in ONSETS:
            return bool(named) and named[0] == self.layers[0]
        return bool(named) and set(named) <= set(self.layers)

    @property
    def false(self) -> list[str]:
        """Names that are neither the planted failure at its place nor what it entails."""
        entailed = FOLLOWS.get(self.case.fault, ())
        return [
            name
            for name, _, layers in self.said
            if name not in entailed and not (name == self.case.failure and self.placed(layers))
        ]


def examined(case: Case, cache: Path | None = None) -> Outcome:
    """Plant, examine with everything on, and keep what was said."""
    model, batch, layers = prepared(case, cache)
    started = time.perf_counter()
    report = fullrank.examine(model, batch, reference=True, verify=True, **AT_ONCE)
    found = report.diagnosis
    assert found is not None
    return Outcome(
        case,
        layers,
        tuple((one.name, str(one.severity), one.layers) for one in found.verdicts),
        tuple(one.claim for one in found.verdicts),
        found.weights,
        tuple((one.name, one.words) for one in found.clear),
        tuple((one.name, one.words) for one in found.unchecked),
        time.perf_counter() - started,
    )


def prepared(case: Case, cache: Path | None = None) -> tuple[Any, Batch, tuple[int, ...]]:
    """The model with its fault, the batch, and the layers where the fault is."""
    options, made = dict(case.options), ARCHITECTURES[case.architecture]
    batch = made.held_out(case.half, case.batch)
    if case.fault == "weak_skips":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            model: Any = faults.WeakClassifier(**options, width=WIDTH, heads=HEADS).eval()
        return model, batch, tuple(faults.merged(model, batch, limit=0.01))
    if case.fresh:
        return fresh(case.architecture, case.seed, **options), batch, ()
    still = case.layers if case.fault == "frozen_queries" else ()
    model = trained(case.architecture, case.seed, still=still, cache=cache)
    if not case.fault or case.fault == "frozen_queries":
        return model, batch, case.layers
    with torch.no_grad():
        return _planted(case, model, batch, options)


def _planted(case: Case, model: nn.Module, batch: Batch, options: dict[str, Any]) -> tuple[Any, Batch, tuple[int, ...]]:
    first, *_ = case.layers
    if case.fault in ("with_beginning", "without_beginning"):
        faults.first_token_as_sink(model, dict.fromkeys(case.layers, options["heads"]), batch)
        if case.fault == "with_beginning":
            return faults.begun(model), batch, ()
        return *faults.without_beginning(model, batch), case.layers
    one_layer: dict[str, Callable[..., None]] = {
        "duplicated_heads": faults.duplicated_heads,
        "drawn_together": faults.drawn_together,
    }
    on_batch = {"shared_direction": faults.shared_direction, "near_overflow": faults.near_overflow}
    layers = {"tiny_queries": faults.tiny_queries, "identities": faults.identities}
    layers["frozen_softmax"] = faults.frozen_softmax
    if case.fault in one_layer:
        one_layer[case.fault](model, first, **options)
    elif case.fault in on_batch:
        on_batch[case.fault](model, first, batch, **options)
    elif case.fault in layers:
        layers[case.fault](model, case.layers, **options)
    else:
        faults.undrawn_queries(model, case.layers, fresh(case.architecture, case.seed + 100))
    if case.fault == "near_overflow":
        batch = {name: value.half() if value.is_floating_point() else value for name, value in batch.items()}
    return model, batch, case.layers


# ------------------------------------------------------------ the list


def _case(half: int, architecture: str, fault: str, layers: int | tuple[int, ...], batch: int, **options: Any) -> Case:
    where = (layers,) if isinstance(layers, int) else layers
    seed = 2 * half + options.pop("seed", 0)
    return Case(HALVES[half], architecture, seed, batch, fault, where, tuple(options.items()))


PRE, POST = "pre-norm encoder", "post-norm encoder"

_PLANTED: Final[dict[str, list[tuple[str, str, Any, dict[str, Any]]]]] = {
    "development": [
        ("gpt2", "duplicated_heads", 2, {"pair": (0, 1)}),
        ("gpt2", "duplicated_heads", 5, {"pair": (3, 1), "noise": 0.01}),
        ("llama", "duplicated_heads", 3, {"pair": (0, 1)}),
        ("llama", "duplicated_heads", 6, {"pair": (3, 2), "scale": 0.5}),
        ("bert", "duplicated_heads", 1, {"pair": (2, 0)}),
        ("bert", "duplicated_heads", 4, {"pair": (0, 3), "noise": 0.05}),
        ("vit", "duplicated_heads", 2, {"pair": (1, 2), "scale": 2.0}),
        (PRE, "duplicated_heads", 3, {"pair": (0, 2)}),
        (POST, "duplicated_heads", 2, {"pair": (1, 3), "noise": 0.02}),
        ("gpt2", "frozen_queries", 3, {}),
        (PRE, "frozen_queries", 3, {}),
        ("vit", "frozen_queries", 2, {}),
        ("llama", "undrawn_queries", 4, {}),
        ("bert", "undrawn_queries", 2, {}),
        ("gpt2", "tiny_queries", 2, {"scale": 0.01}),
        ("llama", "tiny_queries", 3, {"scale": 0.01}),
        ("bert", "tiny_queries", 3, {"scale": 0.001}),
        ("vit", "tiny_queries", 4, {"scale": 0.01}),
        (POST, "tiny_queries", 2, {"scale": 0.01}),
        ("gpt2", "identities", (4,), {}),
        ("gpt2", "identities", (5, 6), {"scale": 0.01}),
        ("gpt2", "identities", (2, 4), {}),
        ("llama", "identities", (3,), {"scale": 0.01}),
        ("llama", "identities", (4, 5, 6), {}),
        ("vit", "identities", (3,), {}),
        ("vit", "identities", (4, 5), {"scale": 0.01}),
        (PRE, "identities", (2,), {}),
        (PRE, "identities", (3, 4), {"scale": 0.001}),
        ("gpt2", "drawn_together", 3, {"contrast": 0.01}),
        ("gpt2", "drawn_together", 5, {"contrast": 0.001}),
        ("llama", "drawn_together", 2, {"contrast": 0.001}),
        ("llama", "drawn_together", 4, {"contrast": 0.01}),
        ("bert", "drawn_together", 2, {"contrast": 0.01}),
        ("bert", "drawn_together", 3, {"contrast": 0.001}),
        ("vit", "drawn_together", 2, {"contrast": 0.001}),
        (PRE, "drawn_together", 3, {"contrast": 0.01}),
        (POST, "drawn_together", 2, {"contrast": 0.001}),
        ("gpt2", "shared_direction", 4, {"contrast": 0.001}),
        ("vit", "shared_direction", 3, {"contrast": 0.001}),
        ("gpt2", "frozen_softmax", (2,), {"factor": 300}),
        ("gpt2", "frozen_softmax", (5,), {"factor": 1000}),
        ("llama", "frozen_softmax", (3,), {"factor": 300}),
        ("llama", "frozen_softmax", (6,), {"factor": 100}),
        ("bert", "frozen_softmax", (1,), {"factor": 1000}),
        ("bert", "frozen_softmax", (3,), {"factor": 300}),
        ("vit", "frozen_softmax", (2,), {"factor": 1000}),
        (PRE, "frozen_softmax", (4,), {"factor": 1000}),
        (POST, "frozen_softmax", (2,), {"factor": 300}),
        ("gpt2", "near_overflow", 3, {"share": 0.6}),
        ("gpt2", "near_overflow", 5, {"share": 0.35}),
        ("llama", "near_overflow", 2, {"share": 0.5}),
        ("llama", "near_overflow", 6, {"share": 0.8}),
        ("vit", "near_overflow", 3, {"share": 0.6}),
        (PRE, "near_overflow", 2, {"share": 0.5}),
        ("gpt2", "without_beginning", (2, 3), {"heads": (0, 1)}),
        ("gpt2", "without_beginning", (3, 4, 5, 6), {"heads": (0, 1, 2)}),
        ("gpt2", "without_beginning", (4, 5), {"heads": (0, 1, 2, 3)}),
        ("gpt2", "without_beginning", (2,), {"heads": (1, 3)}),
        ("gpt2", "without_beginning", (3, 6), {"heads": (2,)}),
    ],
    "blind": [
        ("gpt2", "duplicated_heads", 3, {"pair": (2, 0)}),
        ("gpt2", "duplicated_heads", 6, {"pair": (1, 2), "noise": 0.03}),
        ("llama", "duplicated_heads", 2, {"pair": (2, 3)}),
        ("llama", "duplicated_heads", 5, {"pair": (1, 0), "scale": 1.5}),
        ("bert", "duplicated_heads", 2, {"pair": (3, 1), "noise": 0.02}),
        ("bert", "duplicated_heads", 3, {"pair": (0, 1)}),
        ("vit", "duplicated_heads", 4, {"pair": (0, 3), "scale": 0.7}),
        (PRE, "duplicated_heads", 5, {"pair": (2, 3), "noise": 0.01}),
        (POST, "duplicated_heads", 3, {"pair": (0, 2)}),
        ("gpt2", "frozen_queries", 4, {}),
        (PRE, "frozen_queries", 4, {}),
        ("vit", "frozen_queries", 3, {}),
        ("llama", "undrawn_queries", 2, {}),
        ("bert", "undrawn_queries", 3, {}),
        ("gpt2", "tiny_queries", 5, {"scale": 0.003}),
        ("llama", "tiny_queries", 4, {"scale": 0.01}),
        ("bert", "tiny_queries", 2, {"scale": 0.003}),
        ("vit", "tiny_queries", 2, {"scale": 0.003}),
        (POST, "tiny_queries", 3, {"scale": 0.003}),
        ("gpt2", "identities", (3,), {"scale": 0.005}),
        ("gpt2", "identities", (2, 3), {}),
        ("gpt2", "identities", (3, 6), {"scale": 0.01}),
        ("llama", "identities", (5,), {}),
        ("llama", "identities", (2, 3, 4), {"scale": 0.003}),
        ("vit", "identities", (4,), {"scale": 0.01}),
        ("vit", "identities", (2, 3), {}),
        (PRE, "identities", (4,), {"scale": 0.01}),
        (PRE, "identities", (2, 3), {}),
        ("gpt2", "drawn_together", 2, {"contrast": 0.003}),
        ("gpt2", "drawn_together", 4, {"contrast": 0.01}),
        ("llama", "drawn_together", 3, {"contrast": 0.01}),
        ("llama", "drawn_together", 5, {"contrast": 0.001}),
        ("bert", "drawn_together", 1, {"contrast": 0.001}),
        ("bert", "drawn_together", 3, {"contrast": 0.01}),
        ("vit", "drawn_together", 3, {"contrast": 0.003}),
        (PRE, "drawn_together", 2, {"contrast": 0.001}),
        (POST, "drawn_together", 1, {"contrast": 0.003}),
        ("gpt2", "shared_direction", 3, {"contrast": 0.0005}),
        ("vit", "shared_direction", 2, {"contrast": 0.001}),
        ("gpt2", "frozen_softmax", (3,), {"factor": 1000}),
        ("gpt2", "frozen_softmax", (4,), {"factor": 300}),
        ("llama", "frozen_softmax", (2,), {"factor": 500}),
        ("llama", "frozen_softmax", (5,), {"factor": 200}),
        ("bert", "frozen_softmax", (2,), {"factor": 500}),
        ("bert", "frozen_softmax", (4,), {"factor": 1000}),
        ("vit", "frozen_softmax", (4,), {"factor": 500}),
        (PRE, "frozen_softmax", (2,), {"factor": 500}),
        (POST, "frozen_softmax", (3,), {"factor": 1000}),
        ("gpt2", "near_overflow", 2, {"share": 0.4}),
        ("gpt2", "near_overflow", 6, {"share": 0.7}),
        ("llama", "near_overflow", 3, {"share": 0.8}),
        ("llama", "near_overflow", 5, {"share": 0.4}),
        ("vit", "near_overflow", 4, {"share": 0.5}),
        (PRE, "near_overflow", 3, {"share": 0.7}),
        ("gpt2", "without_beginning", (3, 4), {"heads": (2, 3)}),
        ("gpt2", "without_beginning", (2, 3, 4, 5), {"heads": (1, 2, 3)}),
        ("gpt2", "without_beginning", (5, 6), {"heads": (0, 1, 2, 3)}),
        ("gpt2", "without_beginning", (4,), {"heads": (0, 2)}),
        ("gpt2", "without_beginning", (2, 5), {"heads": (3,)}),
    ],
}

_PLANTED["second blind"] = [  # the layers of the one and the strengths of the other, in models that neither has
    (name, fault, at, more)
    for (name, fault, at, _), (_, _, _, more) in zip(_PLANTED["development"], _PLANTED["blind"], strict=True)
]

_MERGING: Final = {
    "development": ((12, 0.0), (8, 0.0), (24, 0.3), (16, 0.1), (32, 0.5), (20, 0.2)),
    "blind": ((10, 0.0), (14, 0.05), (28, 0.4), (18, 0.15), (24, 0.2), (9, 0.0)),
    "second blind": ((11, 0.0), (15, 0.1), (30, 0.4), (22, 0.2), (26, 0.3), (13, 0.05)),
}
"""Layers of fresh post-norm stacks, and what their skips carry of the stream."""

_FRESH: Final = {
    "development": ((4, 64, 4), (8, 32, 2), (6, 96, 8), (12, 64, 4)),
    "blind": ((5, 64, 8), (10, 32, 4), (6, 128, 4), (14, 48, 4)),
    "second blind": ((7, 64, 4), (9, 48, 4), (5, 112, 8), (13, 64, 8)),
}
"""Layers, width and heads of every architecture at its initialisation."""


def cases(half: str) -> list[Case]:
    """All of a half: the planted ones, then the clean ones."""
    return [*planted(half), *clean(half)]


def planted(half: str) -> list[Case]:
    first = 2 * HALVES.index(half)
    found = [
        Case(half, name, first, batch, fault, (at,) if isinstance(at, int) else at, tuple(more.items()))
        for batch, (name, fault, at, more) in enumerate(_PLANTED[half])
    ]
    for batch, (layers, skip) in enumerate(_MERGING[half]):
        options = (("layers", layers), ("skip", skip))
        found.append(Case(half, POST, 10 * first + batch, batch, "weak_skips", (), options, fresh=True))
    return found


def clean(half: str) -> list[Case]:
    """Trained models on other documents, fresh ones of several sizes, and sinks that have their token."""
    first = 2 * HALVES.index(half)
    found = []
    for name, made in ARCHITECTURES.items():
        seeds, batches = ((0,), range(100, 106)) if made.reads == "text" else ((0, 1), range(100, 103))
        found += [Case(half, name, first + seed, batch) for seed in seeds for batch in batches]
        for index, sizes in enumerate(_FRESH[half]):
            options = tuple(zip(("layers", "width", "heads"), sizes, strict=True))
            found.append(Case(half, name, 50 + 10 * first + index, 200 + index, options=options, fresh=True))
    heads = (("heads", (0, 1)),)
    found += [Case(half, "gpt2", first, 300 + at, "with_beginning", (at, at + 1), heads) for at in (2, 4)]
    return found
