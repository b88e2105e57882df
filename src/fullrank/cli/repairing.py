"""The job of `repair`: load, apply, say what was changed, and save."""

from __future__ import annotations

import json as encoding
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from fullrank.cli.options import Feeding, Loading, Looking
from fullrank.cli.progress import progress
from fullrank.remedies import Repair, asked_for, repaired
from fullrank.remedies.applying.applied import Applied
from fullrank.spec.quiet import quiet
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.repair import call_for
from fullrank.verbs.save_repaired import check_new, save_repaired

__all__ = ["run"]


def run(
    spec: str,
    names: Sequence[str],
    loading: Loading,
    feeding: Feeding,
    *,
    out: Path | None,
    seed: int,
    json: bool,
) -> None:
    """Apply remedies to a checkpoint, show what they did, and write the repaired model where that was asked for.

    Args:
        spec: which model.
        names: remedies, with parameters as in `temperature?scale=2`.
        loading: how to load it.
        feeding: what it is proved on.
        out: a new directory for the repaired model; None to write nothing.
        seed: of random inputs.
        json: print JSON and nothing else on standard output.
    """
    asked = asked_for(list(names), {})
    if out is not None:
        check_new(out)
    with progress(shown=not json) as tell:
        tell(f"loading {spec}", 0.0)
        subject = loaded(spec, seed=seed, head=True, **asdict(loading))
        given = feeding.inputs(subject, Looking(), seed=seed)
        call = call_for(subject, list(given.batches))
        tell("applying", 0.5)
        repair = repaired(subject.model, lambda: call.run(subject.model), asked)
        record = encoding.dumps(_record(repair, out), ensure_ascii=False, indent=2, allow_nan=False)
        if out is not None:
            tell(f"writing {out}", 0.9)
            with quiet():
                save_repaired(subject.model, out, subject.tokenizer, subject.image_processor)
    if json:
        typer.echo(record)
        return
    typer.echo(str(repair))
    for one in repair.applied:
        remedy = one.asked.remedy
        typer.echo(f"\n{remedy.name}: {remedy.limits[0]}")
        typer.echo(f"fullrank remedies {remedy.name} says what else to know.")
    if out is None:
        typer.echo("\nNothing was written; --out DIR saves the repaired model.")
    else:
        typer.echo(f"\nThe repaired model: {out.resolve()}\nnext: fullrank examine {out}")
        typer.echo(f"in Python: fullrank.load_repaired(model, {str(out)!r}), with the plain model")


def _record(repair: Repair, out: Path | None) -> dict[str, Any]:
    return {
        "remedies": [_applied(one) for one in repair.applied],
        "notes": list(repair.notes),
        "out": None if out is None else str(out.resolve()),
    }


def _applied(one: Applied) -> dict[str, Any]:
    proof = one.proof
    return {
        "name": one.asked.remedy.name,
        "parameters": {name: _number(value) for name, value in one.asked.parameters.items()},
        "exactness": one.asked.remedy.exactness,
        "where": list(one.edit.where),
        "added": one.added,
        "output_moved": {"largest": _number(proof.largest), "relative": _number(proof.relative)},
    }


def _number(value: Any) -> Any:
    """JSON has no number for what is infinite, as the distance to an output of another form is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
