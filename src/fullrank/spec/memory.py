"""A budget for weights: what does not fit stays on disk and is read layer by layer while the model runs."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable

import torch
from torch import nn

from fullrank.errors import SpecError

__all__ = ["budget", "within"]

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def budget(memory: str | int) -> int:
    """Bytes of a budget.

    Args:
        memory: a number of bytes, or text such as `2GiB`, `500MB` or `1.5 GiB`.

    Returns:
        Bytes.

    Raises:
        SpecError: for anything else, and for nothing.
    """
    match = _FORM.fullmatch(str(memory))
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if isinstance(memory, bool) or match is None or match[2].lower() not in units:
        raise SpecError(f"memory={memory!r} is no amount of memory; write 2GiB, 500MB or a number of bytes.")
    size = int(float(match[1]) * units[match[2].lower()])
    if size <= 0:
        raise SpecError(
            f"memory={memory!r} leaves no room for a single weight; write 2GiB, 500MB or a number of bytes."
        )
    return size


def within(
    memory: int, device: torch.device, read: Callable[..., tuple[nn.Module, tuple[str, ...]]]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Read a checkpoint so that its weights fill no more than the budget on the device.

    Where the device is an accelerator, what does not fit there stays in the memory of the CPU, and what does not fit
    there on disk. Weights in safetensors are read from where they are and nothing is written; others are written to a
    temporary directory, which goes with the model, or when Python ends.

    Args:
        memory: bytes.
        device: where the model runs.
        read: `weights.pretrained` but for where the weights go.

    Returns:
        The model in evaluation mode and notes.

    Raises:
        SpecError: where accelerate is not installed, or the checkpoint cannot be read.
    """
    try:
        import accelerate  # noqa: F401 - transformers places weights with it
    except ImportError:
        raise SpecError("memory= needs accelerate; pip install 'fullrank[hf]'.") from None
    room: dict[int | str, int] = {"cpu": memory}
    if device.type != "cpu":
        room = {device.index or 0: memory, "cpu": _free()}
    folder = tempfile.mkdtemp(prefix="fullrank-offload-")
    try:
        model, notes = read(placed={"device_map": "auto", "max_memory": room, "offload_folder": folder})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, True)
    return model.eval(), notes


def _free() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63
