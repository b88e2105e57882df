"""What a report says of the model, its input and the run that it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from fullrank.capture import Anatomy
from fullrank.capture.events import Observer
from fullrank.capture.held import held
from fullrank.capture.reference import COMPILED, FAST_PATH
from fullrank.capture.wrappers import class_name
from fullrank.measure import AttentionObserver, SpectrumObserver, StreamObserver, gaussian_nulls
from fullrank.report import HeadSpectrum
from fullrank.spec import Inputs, Subject
from fullrank.verbs.batches import Call
from fullrank.verbs.joined_notes import joined_notes
from fullrank.verbs.ranks import Ranks

__all__ = ["about", "kept_spectra", "null_values"]


def null_values(anatomy: Anatomy, observers: Sequence[Observer], seed: int) -> dict[str, Mapping[str, float]]:
    """What Gaussian tokens of each stack's shape give, by stack and metric."""
    causal = {stack.name: stack.causal for stack in anatomy.stacks}
    shapes = next(observer.shapes for observer in observers if isinstance(observer, StreamObserver))
    return {stack: gaussian_nulls(shape, causal=causal[stack], seed=seed) for stack, shape in shapes.items()}


def kept_spectra(observers: Sequence[Observer]) -> tuple[HeadSpectrum, ...]:
    """The singular values that were kept for drawing."""
    found = (one for observer in observers if isinstance(observer, SpectrumObserver) for one in observer.spectra())
    return tuple(HeadSpectrum(one.place.stack, one.place.layer, one.place.part, *one[1:]) for one in found)


def _sum(told: int | None, calls: Sequence[Call]) -> int | None:
    counts = [call.tokens for call in calls]
    return told if told is not None else None if None in counts else sum(count or 0 for count in counts)


def about(
    subject: Subject,
    given: Inputs | None,
    calls: Sequence[Call],
    anatomy: Anatomy,
    notes: list[str],
    ranks: Ranks,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """The report's `about`, but for what only the whole run knows (nulls, seed, seconds).

    `kernels` says whether the model ran on its own path: `untouched`, or `reference path` where the notes tell of
    another one; each stack has the names of the attention kernels that were called.

    Args:
        subject: the model.
        given: its inputs, where they are the package's own.
        calls: what it was called with.
        anatomy: its stacks.
        notes: sentences for the reader.
        ranks: the processes that examine it.
        observers: of attention, which know the kernels.

    Returns:
        Text, numbers and lists.
    """
    model = subject.model
    said = [*subject.notes, *held(model), *notes, *_of_the_batch(calls)]
    parts = ranks.gathered((sum(call.sequences for call in calls), _sum(given.tokens if given else None, calls), said))
    tokens = [count for _, count, _ in parts]
    told = joined_notes(note for _, _, theirs in parts for note in theirs)
    kernels = next((one.kernels for one in observers if isinstance(one, AttentionObserver)), {})
    description = given.description if given else "the batch that was passed"
    return {
        "model": subject.name,
        "architecture": class_name(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fresh": subject.fresh,
        "stacks": [
            {
                "name": stack.name,
                "blocks": len(stack.paths),
                "heads": stack.heads,
                "width": stack.width,
                "causal": stack.causal,
                "path": stack.paths[0] if stack.paths else "",
                "kernel": ", ".join(kernels.get(stack.name, {})),
            }
            for stack in anatomy.stacks
        ],
        "input": {
            "kind": given.kind if given else "batch",
            "description": f"{description}, in {len(parts)} processes" if ranks.several else description,
            "sequences": sum(sequences for sequences, _, _ in parts),
            "tokens": None if None in tokens else sum(count or 0 for count in tokens),
        },
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "kernels": "reference path" if {COMPILED, FAST_PATH} & set(told) else "untouched",
        "notes": told,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _of_the_batch(calls: Sequence[Call]) -> list[str]:
    """What to know of the batch itself."""
    said = []
    if any(call.past for call in calls):
        new = "one new token per sequence" if any(call.decodes for call in calls) else "several new tokens"
        said.append(
            f"the batch continues a cache: {new}, whose attention is over every key in it; token metrics are of the "
            "new tokens alone, and positions count the keys that the kernel was given."
        )
    packed = [(call.sequences, call.documents.count) for call in calls if call.documents is not None]
    if packed:
        rows, documents = map(sum, zip(*packed, strict=True))
        said.append(
            f"{rows} rows hold {documents} packed documents (positions start anew inside them): token metrics are of "
            "each document, attention's too where its mask keeps them apart; their n counts documents."
        )
    return said
