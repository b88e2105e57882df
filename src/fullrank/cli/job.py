"""The job of `examine` and `demo`: load, feed, measure, show; of one model, or of several as one report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import typer

from fullrank.cli.answers import BAD_INPUT, FOUND
from fullrank.cli.options import Feeding, Loading, Looking
from fullrank.cli.outputs import tell_page
from fullrank.cli.progress import Tell, progress
from fullrank.errors import SpecError
from fullrank.report import Report, Variants
from fullrank.report.verdict import Severity
from fullrank.spec import Spec, Subject, parse
from fullrank.verbs import examine as verb
from fullrank.verbs.examine_each import examine_each
from fullrank.verbs.labels import told_apart
from fullrank.verbs.load_repaired import loaded

__all__ = ["Feeding", "Loading", "Looking", "run"]


def run(
    specs: Sequence[str | Spec],
    loading: Loading,
    feeding: Feeding,
    looking: Looking,
    *,
    revisions: Sequence[str] = (),
    labels: Sequence[str] = (),
    seed: int = 0,
    html: Path | None = None,
    json: bool = False,
    fail_on: Severity | None = None,
    again: str = "",
) -> None:
    """Examine one model, or several one after the other, and show the report.

    Args:
        specs: which models.
        loading: how to load them.
        feeding: what they read.
        looking: what is measured.
        revisions: of one hub id several make several models; one is taken for all.
        labels: names of several models; by default what tells them apart.
        seed: of random weights, random inputs and starting vectors.
        html: where the page goes; checked by the caller to be writable.
        json: print JSON and nothing else on standard output.
        fail_on: the gravity of a verdict from which on the exit code is 1.
        again: the command that tests the verdicts, where none with a SPEC does.

    Raises:
        SpecError: for labels or revisions that do not go with the models.
        Exit: with code 2 where some of several models could not be examined, after showing the others; with code 1
            where a verdict is as grave as `fail_on`.
    """
    wanted = _wanted(specs, loading, revisions)
    if labels and len(labels) != len(wanted):
        raise SpecError(f"--label was given {len(labels)} times for {len(wanted)} models; give each of several a name.")
    made: Report | Variants
    with progress(shown=not json) as tell:
        if len(wanted) == 1 and not labels:
            made = _asked(_one(*wanted[0], feeding, looking, seed=seed, tell=tell), again)
        else:
            made = _several(wanted, feeding, looking, labels=labels, seed=seed, tell=tell)
        if html is not None:
            tell(f"writing {html}", 1.0)
            made.save_html(html)
    if json:
        typer.echo(made.to_json())
    else:
        made.print(page_written=html is not None)
    tell_page(html, json=json)
    failed = made.failed if isinstance(made, Variants) else ()
    for one in failed:
        typer.echo(f"fullrank: {one.label} was not examined: {one.reason}", err=True)
    if failed:
        raise typer.Exit(BAD_INPUT)
    reports = made.reports if isinstance(made, Variants) else (made,)
    grave = [one for report in reports for one in report.verdicts if fail_on and one.severity.rank >= fail_on.rank]
    if grave:
        typer.echo(f"fullrank: {grave[0].severity}: {grave[0].name}, and --fail-on {fail_on} was given.", err=True)
        raise typer.Exit(FOUND)


def _asked(report: Report, again: str) -> Report:
    """The report whose verdicts name another command that tests them."""
    if not again or report.diagnosis is None:
        return report
    verdicts = (
        replace(one, command=again) if one.command.endswith(" --verify") else one for one in report.diagnosis.verdicts
    )
    return replace(report, diagnosis=replace(report.diagnosis, verdicts=tuple(verdicts)))


def _wanted(
    specs: Sequence[str | Spec], loading: Loading, revisions: Sequence[str]
) -> list[tuple[str | Spec, Loading]]:
    """Every model with how it is loaded."""
    if len(specs) > 1 and len(revisions) > 1:
        raise SpecError(
            f"--revision was given {len(revisions)} times with {len(specs)} SPECs; several revisions go with one SPEC, "
            "one revision with several."
        )
    if not revisions:
        return [(spec, loading) for spec in specs]
    return [(spec, replace(loading, revision=revision)) for spec in specs for revision in revisions]


def _one(spec: str | Spec, loading: Loading, feeding: Feeding, looking: Looking, *, seed: int, tell: Tell) -> Report:
    spec = parse(spec) if isinstance(spec, str) else spec
    tell(f"loading {spec.text}", 0.0)
    subject = loaded(spec, seed=seed, **asdict(loading))
    given = feeding.inputs(subject, looking, seed=seed)
    with _hushed():  # only now is it known whether transformers is there; load and inputs are quiet by themselves
        return verb.examine(subject, given, seed=seed, progress=tell, **looking.arguments)


def _several(
    wanted: Sequence[tuple[str | Spec, Loading]],
    feeding: Feeding,
    looking: Looking,
    *,
    labels: Sequence[str],
    seed: int,
    tell: Tell,
) -> Variants:
    texts = [spec if isinstance(spec, str) else spec.text for spec, _ in wanted]
    names = [f"{text}@{how.revision}" if how.revision else text for text, (_, how) in zip(texts, wanted, strict=True)]
    makers = [partial(_loaded, spec, how, seed=seed) for spec, how in wanted]
    made_by_transformers = not all(text.strip().startswith("python:") for text in texts)
    with _hushed(made_by_transformers):
        return examine_each(
            makers,
            partial(feeding.inputs, looking=looking, seed=seed),
            labels=labels or told_apart(names),
            seed=seed,
            progress=tell,
            **looking.arguments,
        )


def _loaded(spec: str | Spec, loading: Loading, *, seed: int) -> Subject:
    return loaded(spec, seed=seed, **asdict(loading))


@contextmanager
def _hushed(transformers: bool = False) -> Iterator[None]:
    """No chatter of transformers while its models run, where it is what they are made with."""
    if "transformers" not in sys.modules and not transformers:
        yield
        return
    from fullrank.spec.quiet import quiet

    with quiet():
        yield
