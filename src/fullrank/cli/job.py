"""The job of `examine` and `demo`: load, feed, measure, show."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from fullrank.cli.progress import progress
from fullrank.spec import Spec, inputs, load, parse
from fullrank.verbs import examine as verb

__all__ = ["Feeding", "Loading", "run"]


@dataclass(frozen=True)
class Loading:
    """The options of `spec.load`, by its names."""

    init: bool = False
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    memory: str | None = None


@dataclass(frozen=True)
class Feeding:
    """The options of `spec.inputs`, by its names."""

    context: int | None = None
    documents: int | None = None
    text: Path | None = None
    data: Path | None = None
    images: Sequence[str] | None = None


def run(
    spec: str | Spec,
    loading: Loading,
    feeding: Feeding,
    *,
    seed: int = 0,
    spectrum: bool = True,
    blocks: str | None = None,
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Examine a model and show the report.

    Args:
        spec: which model.
        loading: how to load it.
        feeding: what it reads.
        seed: of random weights, random inputs and starting vectors.
        spectrum: whether to take singular values.
        blocks: path of the list of blocks, where they are not found by themselves.
        html: where the page goes; checked by the caller to be writable.
        json: print JSON and nothing else on standard output.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    with progress(shown=not json) as tell:
        tell(f"loading {spec.text}", 0.0)
        subject = load(spec, seed=seed, **asdict(loading))
        given = inputs(subject, seed=seed, **asdict(feeding))
        with _hushed():  # only now is it known whether transformers is there; load and inputs are quiet by themselves
            report = verb.examine(subject, given, spectrum=spectrum, seed=seed, blocks=blocks, progress=tell)
        if html is not None:
            tell(f"writing {html}", 1.0)
            report.save_html(html)
    if json:
        typer.echo(report.to_json())
    else:
        from rich.console import Console

        Console().print(report)
    if html is not None:
        typer.echo(f"\nThe page: {html.resolve()}" if not json else f"The page: {html.resolve()}", err=json)


@contextmanager
def _hushed() -> Iterator[None]:
    """No chatter of transformers while its models run, where it is what they are made with."""
    if "transformers" not in sys.modules:
        yield
        return
    from fullrank.spec.quiet import quiet

    with quiet():
        yield
