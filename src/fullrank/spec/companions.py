"""What a checkpoint carries beside its weights: the tokenizer, the image processor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fullrank.spec.configuration import first_sentence, refusals
from fullrank.spec.quiet import transformers_or_refuse

__all__ = ["Companions", "companions_of"]

_SAMPLE = "The quick brown fox jumps over the lazy dog."
_OF_A_TOKENIZER = {
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
}
_OF_A_PROCESSOR = {"preprocessor_config.json", "processor_config.json"}


@dataclass(frozen=True)
class Companions:
    """What was found.

    Attributes:
        tokenizer: None where there is none that works.
        image_processor: None where there is none that works.
        notes: what has files in the checkpoint but could not be loaded, such as for a package that is missing.
    """

    tokenizer: Any = None
    image_processor: Any = None
    notes: tuple[str, ...] = ()


def companions_of(place: str, *, text: bool, images: bool, files: Iterable[str], **loading: Any) -> Companions:
    """Load the tokenizer and the image processor of a checkpoint.

    transformers makes an empty tokenizer where a checkpoint has no files of one; a plain English sentence, of which it
    knows nothing, tells the two apart.

    Args:
        place: hub id or directory.
        text: whether the model reads text.
        images: whether it sees images.
        files: names of the checkpoint's files.
        **loading: revision, trust_remote_code, local_files_only.

    Returns:
        What was found, with notes on what was there and could not be loaded.
    """
    transformers, present = transformers_or_refuse(), set(files)
    tokenizer = processor = None
    notes: list[str] = []
    if text:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **loading)
            ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
            if all(number == tokenizer.unk_token_id for number in ids):
                tokenizer = None
        except refusals() as error:
            tokenizer = None
            if present & _OF_A_TOKENIZER:
                notes.append(f"its tokenizer could not be loaded: {first_sentence(error)}")
    if images:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(place, **loading)
        except refusals() as error:
            if present & _OF_A_PROCESSOR:
                notes.append(f"its image processor could not be loaded: {first_sentence(error)}")
    return Companions(tokenizer, processor, tuple(notes))
