"""What a checkpoint carries beside its weights: the tokenizer, the image processor."""

from __future__ import annotations

from typing import Any

from fullrank.spec.configuration import refusals
from fullrank.spec.quiet import transformers_or_refuse

__all__ = ["image_processor_of", "tokenizer_of"]

_SAMPLE = "The quick brown fox jumps over the lazy dog."


def tokenizer_of(place: str, **loading: Any) -> Any:
    """The checkpoint's tokenizer.

    transformers makes an empty tokenizer where a checkpoint has no files of one; a plain English sentence, of which it
    knows nothing, tells the two apart.

    Args:
        place: hub id or directory.
        **loading: revision, trust_remote_code, local_files_only.

    Returns:
        The tokenizer; None where there is none that works.
    """
    try:
        tokenizer = transformers_or_refuse().AutoTokenizer.from_pretrained(place, **loading)
        ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    except refusals():
        return None
    return tokenizer if any(number != tokenizer.unk_token_id for number in ids) else None


def image_processor_of(place: str, **loading: Any) -> Any:
    """The checkpoint's image processor.

    Args:
        place: hub id or directory.
        **loading: revision, trust_remote_code, local_files_only.

    Returns:
        The processor; None where there is none that works.
    """
    try:
        return transformers_or_refuse().AutoImageProcessor.from_pretrained(place, **loading)
    except refusals():
        return None
