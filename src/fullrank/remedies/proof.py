"""Proof that a remedy acts: how far the output moved, and whether what was added has a part in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed

__all__ = ["Proof", "answer_of", "proof_of"]

_STIRS = (0.1, 1.0, 10.0)
"""Of added parameters, one after the other until the output moves: some start so low that half precision does not see
a small change, and what is large may overflow."""


@dataclass(frozen=True)
class Proof:
    """What a remedy did to the output of one forward in evaluation mode.

    Attributes:
        largest: the largest change of an entry of the output.
        relative: ‖Δy‖/‖y‖.
        unheard: names of added parameters that the output does not depend on.
        acts: whether anything of it was seen to act.
    """

    largest: float
    relative: float
    unheard: tuple[str, ...]
    acts: bool

    def __str__(self) -> str:
        if not self.acts:
            return "on this batch it changes nothing"
        if self.largest == 0:
            return "the output is the same, bit for bit"
        if self.largest == float("inf"):
            return "the output has another form"
        return f"the output moves by {self.relative:.2g} of its norm ({self.largest:.2g} at most)"


def answer_of(model: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The first floating tensor that a forward returns, in evaluation mode; the model is left as it was.

    Returns:
        A copy, in float32 or wider; empty where nothing floating is returned.
    """
    with undisturbed(model), torch.no_grad():
        found = next(_floating(forward()), None)
    if found is None:
        return torch.zeros(0)
    return found.detach().to(torch.float64 if found.dtype == torch.float64 else torch.float32).clone()


def proof_of(
    model: nn.Module,
    forward: Callable[[], Any],
    before: Tensor,
    added: Mapping[str, nn.Parameter],
    *,
    acts: bool,
    others: Sequence[nn.Parameter] = (),
) -> Proof:
    """Compare outputs, and stir the added parameters where the output alone shows nothing.

    Args:
        model: the model as it is repaired.
        forward: one forward pass.
        before: what it returned before.
        added: parameters that the remedy has added.
        acts: whether something else shows that it acts, such as changed weights or a term of the loss.
        others: parameters that remedies before it have added: at 0 they may hide it.

    Returns:
        The proof.
    """
    after = answer_of(model, forward)
    same_form = after.shape == before.shape
    moved = after - before.to(after.device) if same_form else torch.full((1,), float("inf"))
    norm = float(before.norm())
    largest = float(moved.abs().max()) if moved.numel() else 0.0
    unheard = [] if not added else _unheard(model, forward, after, list(added.items()), others)
    return Proof(
        largest=largest,
        relative=float(moved.norm()) / norm if norm else largest,
        unheard=tuple(unheard),
        acts=acts or largest > 0 or (bool(added) and len(unheard) < len(added)),
    )


def _unheard(
    model: nn.Module,
    forward: Callable[[], Any],
    after: Tensor,
    added: Sequence[tuple[str, nn.Parameter]],
    others: Sequence[nn.Parameter],
) -> list[str]:
    """Names of parameters without a part in the output: all, where the output stays however much they are stirred."""
    own = [p for _, p in added]
    for size in _STIRS:
        with _stirred(own, size):
            if not torch.equal(answer_of(model, forward), after):
                return []
    if others:
        with _stirred(others, _STIRS[0]):
            opened = answer_of(model, forward)
            for size in _STIRS:
                with _stirred(own, size):
                    if not torch.equal(answer_of(model, forward), opened):
                        return []
    return [name for name, _ in added]


@contextmanager
def _stirred(parameters: Sequence[nn.Parameter], size: float) -> Iterator[None]:
    """Other values for a while."""
    generator = torch.Generator().manual_seed(0)
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.copy_(torch.where(torch.isfinite(p), p, torch.zeros_like(p)) + size * noise)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim > 0:
            yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _floating(item)
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floating(item)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from _floating(getattr(output, name))
