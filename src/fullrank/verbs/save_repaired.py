"""Saving a repaired model: its weights, its configuration, and the record of its repairs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fullrank.capture.wrappers import bare
from fullrank.errors import OutputError
from fullrank.remedies import repairs_in
from fullrank.remedies.applying.applied import of_adapters
from fullrank.remedies.applying.record import KEY

__all__ = ["check_new", "save_repaired"]


def check_new(directory: str | os.PathLike[str]) -> Path:
    """Refuse a directory that holds something, or that cannot be made.

    Args:
        directory: where a model is to be saved.

    Returns:
        It.

    Raises:
        OutputError: where it is a file, is not empty, or its parent is missing.
    """
    place = Path(directory)
    if place.is_dir() and any(place.iterdir()):
        raise OutputError(f"--out {str(place)!r} is not empty; name a new directory.")
    if place.exists() and not place.is_dir():
        raise OutputError(f"--out {str(place)!r} is a file; name a new directory.")
    if not place.absolute().parent.is_dir():
        raise OutputError(f"--out {str(place)!r}: the directory {str(place.absolute().parent)!r} does not exist.")
    return place


def save_repaired(model: nn.Module, directory: str | os.PathLike[str], *companions: Any) -> Path:
    """Write a model with the record of its repairs into a new directory, whole or not at all.

    Models of Hugging Face are saved as they save themselves. Of others, and of repaired models with adapters, all
    weights are written in safetensors; the program that builds the model is not saved. `load_repaired`, and a SPEC of
    the directory, put the repairs in place.

    Args:
        model: repaired or not.
        directory: new or empty.
        companions: what else is saved there by its own `save_pretrained`, such as a tokenizer; None is passed over.

    Returns:
        The directory.

    Raises:
        OutputError: where it cannot be written.
    """
    place = check_new(directory)
    network: Any = bare(model)
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.absolute().parent))
    except OSError as error:
        raise OutputError(f"--out {str(place)!r} cannot be written: {error.strerror or error}.") from None
    try:
        alone = of_adapters(network) and any(one["structural"] for one in repairs_in(network))
        if hasattr(network, "save_pretrained") and not alone:
            network.save_pretrained(made)
        else:
            from safetensors.torch import save_model

            save_model(network, str(made / "model.safetensors"))
            (made / f"{KEY}.json").write_text(json.dumps(repairs_in(network), indent=2), encoding="utf-8")
        for one in companions:
            if one is not None:
                one.save_pretrained(made)
        if place.is_dir():
            place.rmdir()
        made.chmod(0o755)
        made.rename(place)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return place
