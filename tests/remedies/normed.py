"""Models of published families that normalise what their branches add, alone or beside what these read (Gemma 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import kinds
import torch
import transformers as hf
from remedy_patients import Case, stir
from torch import Tensor, nn

BRANCH = ("post_attention_layernorm", "post_feedforward_layernorm")
READ = ("input_layernorm", "pre_feedforward_layernorm")
FAMILIES = ("olmo2", "gemma2")


def normed(family: str) -> Case:
    """One with gains that are not alike."""
    if family != "olmo2":
        kind = kinds.build(family)
        return Case(kind.model, kind.batch, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.Olmo2Model(hf.Olmo2Config(**kinds.TEXT))
    stir(dict(model.named_parameters()), 0.2)
    return Case(model.double().eval(), {"input_ids": kinds.ids(), "use_cache": False}, 3)


def norms_of(model: nn.Module, layer: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The norms of what attention and the MLP of a block add, and those that these read through."""
    block = model.layers[layer - 1]
    found = dict(block.named_children())
    return [found[name] for name in BRANCH], [found[name] for name in READ if name in found]


@contextlib.contextmanager
def without(model: nn.Module, factor: Callable[[int, int], float | Tensor]) -> Iterator[None]:
    """The model with no norm in its blocks, and what each branch adds times a number of its own.

    Args:
        model: an `normed` one.
        factor: of the layer, from 1, and the branch: 0 for attention, 1 for the MLP.

    Yields:
        Nothing.
    """

    def instead(by: float | Tensor) -> Callable[..., Any]:
        return lambda module, args, output: by * args[0]

    with contextlib.ExitStack() as stack:
        for layer in range(1, len(model.layers) + 1):
            branch, read = norms_of(model, layer)
            for place, norm in enumerate(branch):
                stack.callback(norm.register_forward_hook(instead(factor(layer, place))).remove)
            for norm in read:
                stack.callback(norm.register_forward_hook(instead(1.0)).remove)
        yield
