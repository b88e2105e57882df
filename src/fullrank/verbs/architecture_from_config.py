"""An architecture from a configuration: its model at its own initialisation, as far as that has to exist."""

from __future__ import annotations

from typing import Any

from fullrank.architecture import Architecture
from fullrank.spec import Subject, inputs, parse, subject_of
from fullrank.spec.configuration import of_architecture, of_checkpoint
from fullrank.spec.quiet import quiet, transformers_or_refuse
from fullrank.spec.shallow import WHOLE, shallow
from fullrank.verbs.architecture_from_model import architecture_from_model, architecture_of
from fullrank.verbs.batches import as_calls

__all__ = ["architecture_from_config"]

_FEW = 24  # tokens of the forward whose calls are followed


def architecture_from_config(
    config: Any, *, context: int | None = None, seed: int = 0, stack: str | None = None, whole: int = WHOLE
) -> Architecture:
    """The architecture of a configuration at its own random initialisation.

    The model is built and drawn by its own code, then read as by `architecture_from_model` on random tokens or
    synthetic images. Of a model of more than `whole` parameters only the first blocks of each kind are drawn, under the
    full configuration (see `spec.shallow`); depth and whatever depends on it are the full model's. Embeddings are drawn
    whole. The global random state is left as it was.

    Args:
        config: a transformers configuration, or a SPEC: an architecture, a `config.json`, a hub id or a directory, of
            which nothing but the configuration is read.
        context: tokens in a sequence; by default 512, or as many as the model takes.
        seed: of the weights and of the tokens.
        stack: name of the stack, such as `decoder`; by default the first with attention.
        whole: parameters up to which the whole model is drawn.

    Returns:
        The architecture.

    Raises:
        ArchitectureError: for what an architecture has no words for, or what cannot be told.
        FullrankError: for a configuration that cannot be found, or of which no model can be built.
    """
    named = config
    if isinstance(config, str):
        spec = parse(config)
        if spec.kind == "python":
            return architecture_from_model(config, context=context, stack=stack, seed=seed)
        transformers_or_refuse()
        with quiet():
            if spec.kind == "architecture":
                config = of_architecture(spec)
            else:
                config = of_checkpoint(
                    spec.target, text=spec.text, revision=None, trust_remote_code=False, local_only=False
                )
    else:
        named = getattr(config, "_name_or_path", "") or getattr(config, "model_type", "") or type(config).__name__
    drawn = shallow(config, seed=seed, whole=whole)
    subject: Subject = subject_of(drawn.model, name=named)
    given = inputs(subject, context=context, seed=seed)
    calls = as_calls(subject.model, list(given.batches), known=given.real)
    some = inputs(subject, context=_FEW if subject.modality == "text" else None, documents=2, seed=seed)
    short = as_calls(subject.model, list(some.batches), known=some.real)[0]
    return architecture_of(
        subject, calls, short=short, context=context, stack=stack, depth=lambda found: drawn.depth(found.paths)
    )
