"""Adapters on a model: measured as they are, and the tokens that some of them put before every sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import library_class

__all__ = ["adapters", "with_virtual_tokens"]


def adapters(model: nn.Module) -> list[str]:
    """Sentences about adapters of the PEFT package on a model; none where there are none."""
    layer = library_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, layer)]
    said = []
    if layers:
        names = sorted({name for one in layers for name in one.active_adapters})
        how = {"merged into the weights" if one.merged else "added to the weights" for one in layers}
        how = {"switched off"} if all(one.disable_adapters for one in layers) else how
        which = f"{'adapters' if len(names) > 1 else 'adapter'} {', '.join(names)}"
        said.append(f"{which}: measured as found, {' and '.join(sorted(how))}; nothing was merged or switched off.")
    prompt = _prompt(model)
    if prompt is not None:
        what = "virtual tokens stand before every sequence and count as tokens"
        if not _in_the_stream(prompt):
            what = "virtual keys stand before every sequence: attention's positions count them, token metrics do not"
        said.append(f"{prompt.num_virtual_tokens} {what}.")
    return said


def with_virtual_tokens(
    model: nn.Module, real: Tensor | Mapping[str, Tensor] | None
) -> Tensor | Mapping[str, Tensor] | None:
    """Which tokens of the stream are real, where an adapter puts learned ones before those of the batch.

    Args:
        model: the model that is called.
        real: (sequences, tokens) of the batch; by stack where the stacks differ; None when all are.

    Returns:
        The same with one column more for every virtual token; of an encoder and a decoder, the encoder's alone.
    """
    prompt = _prompt(model)
    if real is None or prompt is None or not _in_the_stream(prompt):
        return real
    count = int(prompt.num_virtual_tokens)
    if isinstance(real, Mapping):
        return {name: _longer(one, count) if name == "encoder" else one for name, one in real.items()}
    return _longer(real, count)


def _longer(real: Tensor, count: int) -> Tensor:
    return torch.cat([torch.ones_like(real[:, :1]).expand(-1, count), real], dim=1)


def _prompt(model: nn.Module) -> Any:
    """The configuration of an adapter that learns tokens; None where there is none."""
    if not isinstance(model, library_class("peft", "PeftModel")):
        return None
    wrapped: Any = model
    config = wrapped.active_peft_config
    return config if config.is_prompt_learning else None


def _in_the_stream(prompt: Any) -> bool:
    """Whether the virtual tokens are embeddings before the batch's; else they are keys and values of every layer."""
    return "PREFIX" not in str(prompt.peft_type)
