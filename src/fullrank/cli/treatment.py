"""The commands that change a copy of a model: repair, screen, and the list of what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.answers import answering
from fullrank.cli.arguments import (
    AllowPickle,
    Context,
    Data,
    Device,
    Documents,
    Dtype,
    Html,
    Images,
    Init,
    Json,
    OneSpec,
    Seed,
    Text,
    TrustRemoteCode,
)

__all__ = ["remedies", "repair", "screen"]


def repair(
    spec: OneSpec,
    names: Annotated[
        list[str],
        typer.Argument(metavar="REMEDY…", help="As `fullrank remedies` lists them: 'temperature?kind=log-context'."),
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Save the repaired model there.")] = None,
    init: Init = False,
    context: Context = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to prove it on.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Apply remedies to a model, say what they did, and save it with the record of its repairs.

    What was saved so is loaded with its repairs by every command, and in Python by `fullrank.load_repaired`.
    """
    with answering():
        from fullrank.cli import repairing
        from fullrank.cli.options import Feeding, Loading

        repairing.run(
            spec,
            names,
            Loading(init, None, device, dtype, allow_pickle, trust_remote_code),
            Feeding(context=context, text=text),
            out=out,
            seed=seed,
            json=json,
        )


def screen(
    spec: OneSpec,
    remedies: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="REMEDY",
            help="Try this one, 'temperature?scale=2', or several together, 'a + b'; may be repeated. [default: those "
            "that the verdicts name]",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also train each for so many steps, and rank by loss.")
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings of each.")] = 1,
    rates: Annotated[
        str | None, typer.Option(metavar="R,R,…", help="Learning rates to choose from. [default: 1e-4 to 1e-2]")
    ] = None,
    on_data: Annotated[
        bool, typer.Option("--on-data", help="Train on --text or --data, and not on the built-in task.")
    ] = False,
    recommendations: Annotated[
        bool,
        typer.Option("--recommendations", help="Also try what people recommend first: rates, warm-up, Adam's ε, …"),
    ] = False,
    init: Init = False,
    context: Context = None,
    text: Text = None,
    data: Data = None,
    images: Images = None,
    documents: Documents = None,
    device: Device = "auto",
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    html: Html = None,
    json: Json = False,
) -> None:
    """Try remedies on a model, each on the same weights and batch: what it restores, and with --steps how it trains.

    Nothing about the model is changed.
    """
    with answering():
        from fullrank.cli import screening
        from fullrank.cli.options import Feeding, Loading
        from fullrank.cli.outputs import check_writable

        check_writable(html, option="--html")
        screening.run(
            spec,
            Loading(init, None, device, dtype, allow_pickle, trust_remote_code),
            Feeding(context, documents, text, data, images),
            remedies=remedies or (),
            steps=steps,
            seeds=seeds,
            rates=screening.numbers(rates),
            own_data=on_data,
            recommendations=recommendations,
            seed=seed,
            html=html,
            json=json,
        )


def remedies(
    name: Annotated[
        str | None, typer.Argument(metavar="[REMEDY]", help="One remedy, in full.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List what can be done about a failure: what each computes, how exact it is, and when it does not help."""
    with answering():
        from fullrank.cli import remedy_list

        remedy_list.show(name, json=json)
