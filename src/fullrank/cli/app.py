"""The commands and their options; what they do is next door."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli import treatment
from fullrank.cli.answers import answering
from fullrank.cli.arguments import (
    SPEC,
    AllowPickle,
    Context,
    Contexts,
    Data,
    Device,
    Documents,
    Dtype,
    Heads,
    Html,
    Images,
    Init,
    Json,
    NoSpectrum,
    OneSpec,
    Seed,
    Text,
    TrustRemoteCode,
    Verify,
)
from fullrank.report.verdict import Severity

__all__ = ["app", "main"]

app = typer.Typer(
    name="fullrank",
    help="Does a transformer's signal survive its depth, its context length and its heads?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def fullrank(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Does a transformer's signal survive its depth, its context length and its heads?

    Raises:
        Exit: after printing the version.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"fullrank {installed('fullrank')}")
        raise typer.Exit


@app.command()
def examine(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC", help=SPEC, show_default=False)],
    init: Init = False,
    revisions: Annotated[
        list[str] | None,
        typer.Option("--revision", metavar="R", help="Branch, tag or commit of a hub id; several make a series."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME", help="What one of several models is called; once for each."),
    ] = None,
    context: Context = None,
    contexts: Contexts = None,
    text: Text = None,
    data: Data = None,
    images: Images = None,
    documents: Documents = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most that weights may fill, such as 2GiB; the rest is read layer by layer."),
    ] = None,
    no_spectrum: NoSpectrum = False,
    heads: Heads = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also go back through the model, and measure gradients on the way.")
    ] = False,
    probes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Random projections to go back from, where there is no loss. [default: 4]"),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also measure the weights, by their role.")] = False,
    batch_statistics: Annotated[
        bool, typer.Option("--batch-statistics", help="Batch norms use those of each batch, as in training.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="A time budget for each model, but for loading it and --weights: where it is too short, less is "
            "sampled, and that is said.",
        ),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Do not compare with the same architecture at its initialisation.")
    ] = False,
    verify: Verify = False,
    target_dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--target-dtype", metavar="T", help="Hold the numbers against float16, float8_e4m3, … too; may be repeated."
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(metavar="E", help="The optimiser's: are gradients of queries and keys above it?")
    ] = None,
    fail_on: Annotated[
        Severity | None,
        typer.Option(
            "--fail-on", metavar="S", help="warn or fail: exit with 1 where a verdict is that. [default: never]"
        ),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="PATH", help="The list of blocks, such as transformer.h.")
    ] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Measure what happens inside a model now; of several models, one after the other, as one report.

    Nothing about the model is changed. Without --text, --data or --images a language model reads texts that ship with
    fullrank and a vision model sees synthetic images.
    """
    with answering():
        from fullrank.cli import job
        from fullrank.cli.outputs import check_writable

        check_writable(html, option="--html")
        job.run(
            specs,
            job.Loading(init, None, device, dtype, allow_pickle, trust_remote_code, memory),
            job.Feeding(context, documents, text, data, images),
            job.Looking(
                spectrum=not no_spectrum,
                heads=heads,
                contexts=contexts,
                gradients=gradients,
                probes=probes,
                weights=weights,
                batch_statistics=batch_statistics,
                blocks=blocks,
                seconds=seconds,
                reference=not no_reference,
                verify=verify,
                target_dtypes=target_dtypes or (),
                epsilon=epsilon,
            ),
            revisions=revisions or (),
            labels=labels or (),
            seed=seed,
            html=html,
            json=json,
            fail_on=fail_on,
        )


@app.command()
def predict(
    spec: OneSpec,
    context: Context = None,
    theories: Annotated[
        str | None, typer.Option(metavar="KEY,KEY,…", help="Only these theories. [default: all whose assumptions hold]")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH:N",
            help="A map of what trains over a field of the architecture: residual_scale=0.1:2:50, qk_std=…; twice for "
            "a plane.",
        ),
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also measure the model at its own initialisation, in the same figures.")
    ] = False,
    seed: Seed = 0,
    html: Html = None,
    json: Json = False,
) -> None:
    """Say what theory says of an architecture before it is trained: from its configuration alone.

    Weights are drawn at random where sizes are not enough to know them; none are downloaded.
    """
    with answering():
        from fullrank.cli import prediction
        from fullrank.cli.outputs import check_writable

        check_writable(html, option="--html")
        prediction.run(
            spec,
            context=context,
            theories=theories.split(",") if theories else None,
            vary=vary or (),
            overlay=overlay,
            seed=seed,
            html=html,
            json=json,
        )


for command in (treatment.screen, treatment.repair, treatment.remedies):
    app.command()(command)


@app.command()
def demo(
    html: Annotated[Path, typer.Option("--html", metavar="PATH", help="Where the page goes.")] = Path("report.html"),
    no_spectrum: NoSpectrum = False,
    verify: Verify = False,
    json: Json = False,
) -> None:
    """Examine a small pretrained sentence encoder that comes with the 'demo' extra, and write the page."""
    with answering():
        from fullrank.cli import job
        from fullrank.cli.outputs import check_writable
        from fullrank.spec import demo as packaged

        check_writable(html, option="--html")
        # 256 tokens are what this encoder reads in use: its own configuration cuts longer texts there
        looking = job.Looking(spectrum=not no_spectrum, verify=verify)
        job.run(
            [packaged()],
            job.Loading(),
            job.Feeding(context=256),
            looking,
            html=html,
            json=json,
            again="fullrank demo --verify",
        )


@app.command()
def explain(
    verdict: Annotated[
        str | None, typer.Argument(metavar="[VERDICT]", help="One verdict, in full.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say what a verdict means, when it is harmless, how it is tested and where it comes from."""
    with answering():
        from fullrank.cli import explanations

        explanations.show(verdict, json=json)


@app.command()
def metrics(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One metric, in full.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say what each number means, what is healthy and what is collapsed."""
    with answering():
        from fullrank.cli import glossary

        glossary.show(name, json=json)


def main() -> None:
    """Run the command line."""
    app()
