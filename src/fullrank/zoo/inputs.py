"""Which of its inputs a model was given, and whether it fits."""

from __future__ import annotations

from torch import Tensor

from fullrank.errors import BatchError, ContextError

__all__ = ["require_fitting_mask", "the_one_given", "token_vectors_or_ids"]


def the_one_given(**inputs: Tensor | None) -> str:
    """The name of the only input that is not None.

    Args:
        **inputs: by name.

    Returns:
        Its name.

    Raises:
        BatchError: where there is none, or more than one.
    """
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise BatchError(f"the model was given {' and '.join(given) or 'nothing'}; pass one of {', '.join(inputs)}.")
    return given[0]


def token_vectors_or_ids(x: Tensor, name: str, width: int, context: int | None) -> None:
    """Refuse what is no (sequences, tokens) of ids, or (sequences, tokens, width) of vectors.

    Args:
        x: the input.
        name: `input_ids` or `inputs_embeds`.
        width: of the stream.
        context: longest sequence; None where there is none.

    Raises:
        BatchError: for another shape.
        ContextError: for a sequence that is too long.
    """
    if name == "input_ids" and x.ndim != 2:
        raise BatchError(f"input_ids has the shape {tuple(x.shape)}; expected (sequences, tokens).")
    if name == "inputs_embeds" and (x.ndim != 3 or x.shape[-1] != width):
        raise BatchError(f"inputs_embeds has the shape {tuple(x.shape)}; expected (sequences, tokens, {width}).")
    if context is not None and x.shape[1] > context:
        raise ContextError(f"{name} has {x.shape[1]} tokens, and this model learned {context} positions.")


def require_fitting_mask(mask: Tensor | None, sequences: int, tokens: int) -> None:
    """Refuse a padding mask that is not (sequences, tokens).

    Args:
        mask: 1 for real tokens, 0 for padding.
        sequences: of the batch.
        tokens: of the batch.

    Raises:
        BatchError: for another shape.
    """
    if mask is not None and mask.shape != (sequences, tokens):
        raise BatchError(f"attention_mask has the shape {tuple(mask.shape)}; the tokens have {(sequences, tokens)}.")
