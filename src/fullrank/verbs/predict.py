"""`predict`: what theory says of an architecture, before anything is trained or run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fullrank.architecture import Architecture
from fullrank.errors import ArchitectureError, TheoryError
from fullrank.report import Report
from fullrank.report.prediction import LeftOut, Prediction, Standing
from fullrank.table import Table
from fullrank.theory import Theory
from fullrank.theory.answers import answers
from fullrank.theory.catalogue import chosen, ranked

if TYPE_CHECKING:
    from torch import nn

__all__ = ["architecture_of", "predict"]


def predict(
    subject: Architecture | nn.Module | str,
    batch: Any = None,
    *,
    context: int | None = None,
    theories: Iterable[str] | None = None,
    seed: int = 0,
) -> Report:
    """What theory says of an architecture: the same metrics and layers as `examine`, from sizes and scales alone.

    Theories whose assumptions do not hold are listed with the reason. The others are ranked by how well their
    assumptions hold, before any measurement is seen; `report.primary` names the first. Where they disagree all are
    in the report, each under its source `theory:<key>`.

    Args:
        subject: an `Architecture`; a SPEC, whose configuration is taken (with random weights); or a module, whose
            weights are taken as they are.
        batch: for a module, what its tokens' correlation is measured on; by default one made for it.
        context: tokens in a sequence; by default the architecture's.
        theories: their keys; by default all.
        seed: of the draw that a SPEC's standard deviations are taken of.

    Returns:
        A report; `report.prediction` holds the standing of every theory and the answers.

    Raises:
        ArchitectureError: for what no transformer can be, and where nothing is known of it.
        TheoryError: for a theory that is not known.
    """
    began = time.perf_counter()
    wanted = chosen(theories)
    architecture = architecture_of(subject, batch, context=context, seed=seed)
    standing = ranked(wanted, architecture)
    if theories is not None and not standing:
        why = "; ".join(f"{one.key}: {', '.join(one.reasons(architecture))}" for one in wanted)
        raise TheoryError(f"theories= names none that speaks of this architecture ({why}).")
    prediction = Prediction(
        architecture=dataclasses.asdict(architecture),
        sentence=str(architecture),
        standings=tuple(_standing(fit, one, architecture) for fit, one in standing),
        left_out=tuple(
            LeftOut(one.key, one.title, one.reasons(architecture)) for one in wanted if one.fit(architecture) <= 0
        ),
        answers=tuple(answers(architecture, [one for _, one in standing])),
    )
    rows = [row for _, one in standing for row in one.rows(architecture)]
    about: dict[str, Any] = {"model": architecture.name or "architecture", "stacks": [_stack(architecture)]}
    about["seconds"] = time.perf_counter() - began
    return Report(rows=Table(rows), about=about, prediction=prediction)


def architecture_of(
    subject: Architecture | nn.Module | str, batch: Any = None, *, context: int | None = None, seed: int = 0
) -> Architecture:
    """The architecture that `predict` speaks of.

    Args:
        subject: an architecture, a module or a SPEC.
        batch: for a module, what it is called with.
        context: tokens in a sequence.
        seed: of the draw, for a SPEC.

    Returns:
        The architecture, with `context` where one was given.

    Raises:
        ArchitectureError: for anything else.
    """
    if isinstance(subject, Architecture):
        return subject if context is None else subject.with_(context=context)
    if isinstance(subject, str):
        return Architecture.from_config(subject, context=context, seed=seed)
    from torch import nn

    if not isinstance(subject, nn.Module):
        raise ArchitectureError(
            f"predict takes an Architecture, a torch module or a SPEC, and was given {type(subject).__name__}."
        )
    return Architecture.from_model(subject, batch, context=context)


def _standing(fit: float, one: Theory, architecture: Architecture) -> Standing:
    strained = [each for each in one.assumes if each.degree(architecture) < 1]
    return Standing(one.key, one.title, fit, tuple((each.says, float(each.degree(architecture))) for each in strained))


def _stack(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.stack,
        "blocks": architecture.depth,
        "heads": architecture.heads,
        "width": architecture.width,
        "causal": architecture.mask == "causal",
    }
