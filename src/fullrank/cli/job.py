"""The job of `examine` and `demo`: load, feed, measure, show."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer

from fullrank.cli.progress import progress
from fullrank.errors import ContextError
from fullrank.spec import Spec, inputs, load, parse
from fullrank.verbs import examine as verb
from fullrank.verbs.contexts import checked_contexts, longest_context

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
    contexts: str | None = None,
    heads: str | None = None,
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
        contexts: lengths to take every number at, separated by commas; the inputs are then as long as the longest.
        heads: heads to take singular values of, separated by commas; all by default.
        blocks: path of the list of blocks, where they are not found by themselves.
        html: where the page goes; checked by the caller to be writable.
        json: print JSON and nothing else on standard output.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    lengths = _lengths(contexts)
    with progress(shown=not json) as tell:
        tell(f"loading {spec.text}", 0.0)
        subject = load(spec, seed=seed, **asdict(loading))
        if lengths and feeding.context is None:
            feeding = replace(feeding, context=longest_context(lengths, subject))
        given = inputs(subject, seed=seed, **asdict(feeding))
        with _hushed():  # only now is it known whether transformers is there; load and inputs are quiet by themselves
            report = verb.examine(
                subject,
                given,
                spectrum=spectrum,
                heads=None if heads is None else heads.split(","),
                contexts=lengths or None,
                seed=seed,
                blocks=blocks,
                progress=tell,
            )
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


def _lengths(contexts: str | None) -> tuple[int, ...]:
    if contexts is None:
        return ()
    parts = [part.strip() for part in contexts.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ContextError(f"--contexts {contexts!r} are no lengths; write them with commas, as in 256,1024,4096.")
    return checked_contexts([int(part) for part in parts])


@contextmanager
def _hushed() -> Iterator[None]:
    """No chatter of transformers while its models run, where it is what they are made with."""
    if "transformers" not in sys.modules:
        yield
        return
    from fullrank.spec.quiet import quiet

    with quiet():
        yield
