"""A model that is already in memory, as a subject."""

from torch import nn

from fullrank.spec.subject import Subject, describe, first_option, modality, positions

__all__ = ["subject_of"]


def subject_of(model: nn.Module, name: str | None = None) -> Subject:
    """Describe a module that the caller built or loaded.

    Args:
        model: any module; nothing about it is changed.
        name: what to call it in the report; by default the checkpoint it came from, else its class.

    Returns:
        A subject without tokenizer, whose weights are neither known to be fresh nor to be trained.
    """
    config = getattr(model, "config", None)
    reads = modality(model)
    vocabulary = first_option(config, "vocab_size") if reads in ("text", "multimodal") else None
    return Subject(
        model=model,
        name=name or getattr(config, "_name_or_path", "") or type(model).__name__,
        description=describe(model, "weights as passed"),
        fresh=None,
        modality=reads,
        positions=positions(model),
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
    )
