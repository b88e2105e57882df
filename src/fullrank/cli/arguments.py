"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "SPEC",
    "AllowPickle",
    "Context",
    "Contexts",
    "Data",
    "Device",
    "Documents",
    "Dtype",
    "Heads",
    "Html",
    "Images",
    "Init",
    "Json",
    "NoSpectrum",
    "OneSpec",
    "Seed",
    "Text",
    "TrustRemoteCode",
    "Verify",
]

SPEC = (
    "A Hugging Face hub id (bert-base-uncased), a local directory (./checkpoint), an architecture "
    "('arch:vit?num_hidden_layers=24'), a config.json file, or python:package.module:factory."
)

Html = Annotated[Path | None, typer.Option("--html", metavar="PATH", help="Write the page to this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
NoSpectrum = Annotated[bool, typer.Option("--no-spectrum", help="Leave out singular values, the dear part.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, metavar="S", help="Of random weights, random inputs and starting vectors.")
]
Context = Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence. [default: 512 or the model's]")]
Contexts = Annotated[
    str | None,
    typer.Option(metavar="N,N,…", help="Also take every number at these lengths, and its slope: 256,1024,4096."),
]
Heads = Annotated[
    str | None,
    typer.Option(metavar="L.H,…", help="Singular values of these heads only: 3.5 is layer 3, head 5; or decoder.3.5."),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Test suspicions: skip blocks, silence heads, and see what that changes.")
]
Documents = Annotated[int | None, typer.Option(metavar="N", help="How many sequences. [default: 8, or all images]")]
OneSpec = Annotated[str, typer.Argument(metavar="SPEC", help=SPEC, show_default=False)]
Init = Annotated[bool, typer.Option("--init", help="Use the architecture's own random weights.")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="A text to read, cut into stretches.")]
Data = Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="One document per line, field 'text'.")]
Images = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Image, directory or pattern; may be repeated.")]
Device = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="T", help="float32, bfloat16, float16 or float64. [default: the checkpoint's]"),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights that are only pickles.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")]
