"""The job of `screen`: load, diagnose, try, show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from fullrank.cli.options import Feeding, Loading, Looking
from fullrank.cli.outputs import tell_page
from fullrank.cli.progress import progress
from fullrank.errors import TrialError
from fullrank.spec import Subject
from fullrank.spec.quiet import quiet
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.screen import screen
from fullrank.verbs.screen_arguments import joined

__all__ = ["numbers", "run"]

_SIZE = 8  # sequences in a batch of one's own text


def run(
    spec: str,
    loading: Loading,
    feeding: Feeding,
    *,
    remedies: Sequence[str],
    steps: int,
    seeds: int,
    rates: Sequence[float] | None,
    own_data: bool,
    recommendations: bool,
    seed: int,
    html: Path | None,
    json: bool,
) -> None:
    """Screen a model and show the screening.

    Args:
        spec: which model.
        loading: how to load it.
        feeding: what it is examined on.
        remedies: to try; those that the verdicts name where it is empty.
        steps: of each training; 0 for none.
        seeds: how many trainings of each.
        rates: learning rates to choose from; None for the usual ones.
        own_data: train on the texts that were given, and not on the built-in task.
        recommendations: also try plain changes of the training.
        seed: of random weights and inputs.
        html: where the page goes; checked by the caller to be writable.
        json: print JSON and nothing else on standard output.

    Raises:
        TrialError: for options of training without steps, or texts to train on that were not given.
    """
    for name in remedies:
        joined(name)  # before anything is loaded
    if not steps and (own_data or recommendations or rates or seeds > 1):
        raise TrialError("--on-data, --recommendations, --rates and --seeds are of training: give --steps too.")
    if own_data and feeding.text is None and feeding.data is None:
        raise TrialError("--on-data trains on what --text or --data gives: name one of them.")
    with progress(shown=not json) as tell:
        tell(f"loading {spec}", 0.0)
        subject = loaded(spec, seed=seed, head=True, **asdict(loading))
        given = feeding.inputs(subject, Looking(), seed=seed)
        more: dict[str, Any] = {} if rates is None else {"rates": tuple(rates)}
        with quiet():
            found = screen(
                subject,
                given,
                remedies=list(remedies) or None,
                steps=steps,
                data=_batches(subject, feeding, steps, seed) if own_data else None,
                recommendations=None if recommendations else (),
                seeds=tuple(range(seeds)),
                seed=seed,
                progress=tell,
                **more,
            )
        if html is not None:
            tell(f"writing {html}", 1.0)
            found.save_html(html)
    if json:
        typer.echo(found.to_json())
    else:
        found.print(page_written=html is not None)
    tell_page(html, json=json)


def numbers(words: str | None) -> tuple[float, ...] | None:
    """Learning rates, separated by commas.

    Args:
        words: of the command line.

    Returns:
        Rising; None where none were given.

    Raises:
        TrialError: for what are no positive numbers.
    """
    if words is None:
        return None
    try:
        found = sorted({float(word) for word in words.split(",")})
    except ValueError:
        found = []
    if not found or found[0] <= 0 or found[-1] == float("inf"):
        raise TrialError(f"--rates {words!r} are no learning rates; write them with commas, as in 1e-4,3e-4,1e-3.")
    return tuple(found)


def _batches(subject: Subject, feeding: Feeding, steps: int, seed: int) -> list[dict[str, Any]]:
    """The texts as batches with labels: as many as are trained on, and as many again for choosing and for judging."""
    wanted = replace(feeding, documents=2 * steps * _SIZE)
    found: list[dict[str, Any]] = []
    for batch in wanted.inputs(subject, Looking(), seed=seed).batches:
        ids = batch["input_ids"]
        for start in range(0, len(ids), _SIZE):
            part = {name: value[start : start + _SIZE] for name, value in batch.items() if hasattr(value, "shape")}
            real = part.get("attention_mask")
            part["labels"] = part["input_ids"] if real is None else part["input_ids"].masked_fill(real == 0, -100)
            found.append(part)
    return found
