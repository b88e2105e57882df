"""Blocks of known models written by hand, with a function of one's own where they add a branch to the stream."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import kinds
import torch
from remedy_patients import stir
from test_residual import BY_HAND
from torch import Tensor

import fullrank

NAMES = ("gpt2", "llama_padded", "bert", "vit", "torch_encoder", "plain")
POST = ("bert", "torch_encoder")

Add = Callable[[int, str, Tensor, Tensor], Tensor]
"""(layer, branch, X, F) → the new state."""


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """Without the fused inference path of `nn.TransformerEncoder`."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def repaired(name: str, remedy: str, **parameters: Any) -> tuple[Tensor, list[Tensor]]:
    """The answer of a repaired model, and its added parameters, stirred, in the order of what was changed."""
    kind = kinds.build(name)
    known = {id(p) for p in kind.model.parameters()}
    with reference_path(), torch.no_grad():
        batch = kind.batch
        with fullrank.repair(kind.model, remedy, batch=batch, **parameters) as repair:
            added = {n: p for n, p in kind.model.named_parameters() if id(p) not in known}
            stir(added)
            places = [re.sub(r".*\((.*)\)", r"\1", place) for place in repair.applied[0].edit.where]
            names = dict.fromkeys(n for place in places for n in added if n.startswith(f"{place}."))
            return kind(), [added[n].detach().clone() for n in names]


def by_hand(name: str, add: Add, *, normed: bool = True) -> Tensor:
    """The answer of the model by hand.

    Args:
        name: of the model.
        add: what stands for X + F.
        normed: whether its blocks have their norms.
    """
    kind = kinds.build(name)
    (stack,) = kind.lists
    for layer, block in enumerate(kind.blocks(stack), 1):
        if not normed:
            _without_norms(block)
        block.forward = BY_HAND[name](block, _in_turns(layer, add))
    with reference_path(), torch.no_grad():
        return kind()


def _in_turns(layer: int, add: Add) -> Callable[[Tensor, Tensor], Tensor]:
    turns = iter(("attention", "mlp"))
    return lambda X, F: add(layer, next(turns), X, F)


def _without_norms(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if "norm" in type(child).__name__.lower():
            setattr(module, name, torch.nn.Identity())
        else:
            _without_norms(child)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=tolerance)
