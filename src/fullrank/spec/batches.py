"""What the model is fed: batches of text, images or sound, with the mask of real tokens and a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.spec import documents as texts
from fullrank.spec import images as pictures
from fullrank.spec import sequences, sound
from fullrank.spec.subject import Subject, first_option, forward_names

__all__ = ["Inputs", "inputs"]

TOKENS_AT_ONCE = 8192
_CHARACTERS_PER_TOKEN = 32  # more than any text needs: what lies beyond documents · context · this is not read


@dataclass(frozen=True, eq=False)
class Inputs:
    """Batches that the model can be called with, one after the other.

    Attributes:
        batches: what each forward is called with (a mapping: keyword arguments), on the model's device.
        real: per batch (sequences, tokens) bool, which tokens are not padding; None where all are or nobody knows.
        kind: what it is.
        description: one line for the reader of the report.
        sequences: how many sequences, images or recordings, over all batches.
        tokens: how many real tokens; None where only the model knows (patches of an image).
        closing: how many special tokens end every sequence of text.
    """

    batches: list[Any]
    real: list[Tensor | None]
    kind: Literal["text", "random tokens", "images", "synthetic images", "text and images", "synthetic sound", "given"]
    description: str
    sequences: int
    tokens: int | None
    closing: int = 0


def inputs(
    subject: Subject,
    *,
    context: int | None = None,
    documents: int | None = None,
    text: str | Path | None = None,
    data: str | Path | None = None,
    images: pictures.ImageFiles | None = None,
    seed: int = 0,
) -> Inputs:
    """Make what the subject is fed.

    A language model reads texts that ship with the package, through its tokenizer, or random tokens where it has none;
    a vision model sees seeded synthetic images; two towers get both. Short sequences come in one padded batch, long
    ones (more than 8192 tokens in all) one by one.

    Args:
        subject: from `load`.
        context: tokens per sequence; by default min(512, what the model takes).
        documents: how many sequences; by default 8, or all images given.
        text: a text file (or the text itself), cut into consecutive stretches.
        data: a JSON-lines file with a field `text`; one sequence per line.
        images: image files, directories or patterns.
        seed: of random tokens, synthetic images and sound.

    Returns:
        The inputs, on the model's device.

    Raises:
        BatchError: one sentence on what cannot be read, or is not for this model.
    """
    given = {name: value for name, value in (("text", text), ("data", data), ("images", images)) if value is not None}
    if len(given) > 1:
        raise BatchError(f"{' and '.join(f'{name}=' for name in given)} were both given; pass one of them.")
    if documents is not None and documents < 1:
        raise BatchError(f"documents={documents}; at least one is needed.")
    reads = subject.modality
    wanted = {"text": ("text", "data"), "vision": ("images",), "multimodal": ("text", "data", "images")}.get(reads, ())
    for name in given:
        if name not in wanted:
            accepts = " or ".join(f"{option}=" for option in wanted) or "only a batch from Python"
            raise BatchError(f"{name}= was given, but {subject.name} reads {reads} input; it takes {accepts}.")
    if subject.batch is not None:
        return _given(subject)
    if context is not None and reads not in ("text", "multimodal"):
        raise BatchError(f"context={context} was given, but {subject.name} reads {reads} input, not text.")
    count = 8 if documents is None else documents
    if reads == "text":
        return _text(subject, context=context, count=count, text=text, data=data, seed=seed)
    if reads == "vision":
        return _vision(subject, documents=documents, images=images, seed=seed)
    if reads == "multimodal":
        seen = _vision(subject, documents=documents, images=images, seed=seed)
        read = _text(subject, context=context, count=seen.sequences, text=text, data=data, seed=seed)
        return _both(seen, read)
    if reads == "audio":
        return _sound(subject, count=count, seed=seed)
    raise BatchError(
        f"what {subject.name} reads is not known; let python:module:factory return (model, batch), "
        "or call fullrank.examine(model, batch)."
    )


def _text(
    subject: Subject, *, context: int | None, count: int, text: str | Path | None, data: str | Path | None, seed: int
) -> Inputs:
    length = sequences.chosen_context(subject, context)
    beyond = subject.max_positions is not None and length > subject.max_positions
    if subject.tokenizer is None:
        if text is not None or data is not None:
            raise BatchError(f"{subject.name} has no tokenizer to read {'text' if text is not None else 'data'}= with.")
        ids = sequences.random_tokens(subject, context=length, count=count, seed=seed)
        kind: Literal["text", "random tokens"] = "random tokens"
        closing = 0
        told = f"drawn evenly from the vocabulary (there is no tokenizer), seed {seed}"
    else:
        kind = "text"
        characters = length * _CHARACTERS_PER_TOKEN
        if text is not None:
            source = texts.from_text(text, characters=characters * count)
        elif data is not None:
            source = texts.from_jsonl(data, count=count, characters=characters)
        else:
            source = texts.shipped(count)
        ids, how = sequences.cut(source, subject, context=length, count=count)
        closing = sequences.closing_tokens(subject, source.texts[0])
        told = f"{source.source}, {how}"
    batches, real = _padded(ids, subject)
    lengths = sorted(map(len, ids))
    span = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
    told += f"; {span} tokens each"
    if beyond:
        told += f", beyond the {subject.max_positions} positions the model is configured for"
    return Inputs(batches, real, kind, told, len(ids), sum(lengths), closing)


def _padded(ids: Sequence[Sequence[int]], subject: Subject) -> tuple[list[Any], list[Tensor | None]]:
    """One batch padded on the right, or one per sequence where they are long."""
    longest = max(map(len, ids))
    groups = [ids] if longest * len(ids) <= TOKENS_AT_ONCE else [[sequence] for sequence in ids]
    names = forward_names(subject.model)
    pad, start = _special(subject, "pad", "eos"), _special(subject, "decoder_start", "bos", "pad")
    batches: list[Any] = []
    masks: list[Tensor | None] = []
    for group in groups:
        width = max(map(len, group))
        tokens = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in group])
        real = torch.tensor([[place < len(sequence) for place in range(width)] for sequence in group])
        batch = {"input_ids": tokens}
        if "attention_mask" in names:
            batch["attention_mask"] = real.long()
        if "decoder_input_ids" in names and getattr(subject.config, "is_encoder_decoder", False):
            # The decoder reads the same document one step late, so that its n-th token is real where the encoder's is.
            late = torch.cat([torch.full((len(group), 1), start), tokens[:, :-1]], 1)
            batch["decoder_input_ids"] = torch.where(real, late, pad)
            if "decoder_attention_mask" in names:
                batch["decoder_attention_mask"] = real.long()
        batches.append({name: tensor.to(subject.device) for name, tensor in batch.items()})
        masks.append(real.to(subject.device))
    return batches, masks


def _special(subject: Subject, *names: str) -> int:
    """The first of these special tokens that tokenizer or configuration have; else 0, which every vocabulary has."""
    for name in names:
        for holder in (subject.tokenizer, subject.config):
            number = first_option(holder, f"{name}_token_id")
            if isinstance(number, int) and 0 <= number < (subject.vocabulary or number + 1):
                return number
    return 0


def _vision(subject: Subject, *, documents: int | None, images: pictures.ImageFiles | None, seed: int) -> Inputs:
    if images is not None:
        files = pictures.expand(images)[:documents]
        pixels, kind = pictures.read(files, subject), "images"
        how = "its image processor" if subject.image_processor is not None else "resizing and scaling to [−1, 1]"
        told = f"{len(files)} files through {how}"
    else:
        pixels, kind = pictures.synthetic(subject, count=documents or 8, seed=seed), "synthetic images"
        told = f"smooth random fields of varied roughness, seed {seed}"
    name = "pixel_values" if "pixel_values" in forward_names(subject.model) else str(subject.model.main_input_name)
    frames = first_option(subject.config, "num_frames")
    if isinstance(frames, int) and frames > 1:
        pixels = pixels[:, None].expand(-1, frames, -1, -1, -1)
        told += f", each held still for {frames} frames"
    size = " × ".join(map(str, pixels.shape[1:]))
    pixels = pixels.to(subject.device, subject.dtype)
    chunks = pixels.split(8)
    batches = [{name: chunk} for chunk in chunks]
    return Inputs(batches, [None] * len(chunks), kind, f"{told}; {size} each", len(pixels), None)  # type: ignore[arg-type]


def _both(seen: Inputs, read: Inputs) -> Inputs:
    """Pair every image with a text; one batch each where they were batched alike, else pair by pair."""
    count = min(seen.sequences, read.sequences)
    pixels = torch.cat([next(iter(batch.values())) for batch in seen.batches])
    name = next(iter(seen.batches[0]))
    batches: list[Mapping[str, Tensor]] = []
    first = 0
    for batch in read.batches:
        size = len(batch["input_ids"])
        batches.append({**batch, name: pixels[first : first + size]})
        first += size
    told = f"{read.description}; {seen.description}"
    return Inputs(batches, read.real, "text and images", told, count, read.tokens, read.closing)


def _sound(subject: Subject, *, count: int, seed: int) -> Inputs:
    features = sound.synthetic(subject, count=count, seed=seed).to(subject.device, subject.dtype)
    names = forward_names(subject.model)
    batch = {str(subject.model.main_input_name): features}
    told = f"noise of wandering loudness, seed {seed}; {' × '.join(map(str, features.shape[1:]))} each"
    if "decoder_input_ids" in names and subject.vocabulary is not None:
        length = min(64, subject.max_positions or 64)
        ids = sequences.random_tokens(subject, context=length, count=count, seed=seed)
        batch["decoder_input_ids"] = torch.tensor(ids, device=subject.device)
        told += f"; {length} random tokens each for the decoder"
    batches = [{key: value[[row]] for key, value in batch.items()} for row in range(count)]
    return Inputs(batches, [None] * count, "synthetic sound", told, count, None)


def _given(subject: Subject) -> Inputs:
    """The batch a Python factory gave, as it is."""
    batch = subject.batch
    tensors = [batch] if isinstance(batch, Tensor) else []
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    elif isinstance(batch, (tuple, list)):
        tensors = [value for value in batch if isinstance(value, Tensor)]
    if not tensors or tensors[0].dim() == 0:
        raise BatchError(f"the batch of {subject.name} holds no tensor; it is a mapping, a tuple or a tensor.")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    tokens = int(real.sum()) if real is not None else None
    size = " × ".join(map(str, tensors[0].shape))
    return Inputs([batch], [real], "given", f"the batch of {subject.name}: {size}", len(tensors[0]), tokens)
