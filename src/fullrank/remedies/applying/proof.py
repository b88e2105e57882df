"""Proof that a remedy acts: how far the output moved, and whether what was added has a part in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.remedies.applying.answer import answer_of
from fullrank.remedies.applying.heard import unheard

__all__ = ["Proof", "proof_of"]


@dataclass(frozen=True)
class Proof:
    """What a remedy did to the output of one forward in evaluation mode.

    Attributes:
        largest: the largest change of an entry of the output that was finite and is; ∞ where it has another form.
        relative: ‖Δy‖/‖y‖ over these.
        turned: how many entries became NaN or infinite, or ceased to be.
        nans: how many entries are NaN now; nothing is known of these.
        unheard: names of added parameters that neither the output nor a penalty depends on.
        acts: whether anything of it was seen to act.
    """

    largest: float
    relative: float
    unheard: tuple[str, ...]
    acts: bool
    turned: int = 0
    nans: int = 0

    def __str__(self) -> str:
        said = f", of which {self.nans:,} entries are NaN" if self.nans else ""
        if not self.acts:
            return f"on this batch it changes nothing{' of the output' if said else ''}{said}"
        if self.largest == float("inf"):
            return "the output has another form"
        if self.turned:
            return f"{self.turned:,} entries of the output became NaN or infinite, or ceased to be{said}"
        if self.largest == 0:
            return f"the output is the same, bit for bit{said}"
        return f"the output moves by {self.relative:.2g} of its norm ({self.largest:.2g} at most){said}"


def proof_of(
    model: nn.Module,
    forward: Callable[[], Any],
    before: Tensor,
    added: Mapping[str, nn.Parameter],
    *,
    acts: bool,
    others: Sequence[nn.Parameter] = (),
) -> tuple[Proof, Tensor]:
    """Compare outputs, and ask of each added parameter whether it has a part in them.

    Args:
        model: the model as it is repaired.
        forward: one forward pass.
        before: what it returned before.
        added: parameters that the remedy has added.
        acts: whether something else shows that it acts, such as changed weights or a term of the loss.
        others: parameters that remedies before it have added: at 0 they may hide it.

    Returns:
        The proof, and what the forward returns now.
    """
    after = answer_of(model, forward)
    largest, relative, turned = _moved(before.to(after.device), after)
    silent = unheard(model, forward, after, added, others) if added else []
    proof = Proof(
        largest=largest,
        relative=relative,
        turned=turned,
        nans=int(after.isnan().sum()),
        unheard=tuple(silent),
        acts=acts or largest > 0 or turned > 0 or (bool(added) and len(silent) < len(added)),
    )
    return proof, after


def _moved(before: Tensor, after: Tensor) -> tuple[float, float, int]:
    """The largest change, the relative one, and how many entries are finite in one of both alone or infinite anew."""
    if after.shape != before.shape:
        return float("inf"), float("inf"), 0
    if not after.numel():
        return 0.0, 0.0, 0
    finite = before.isfinite() & after.isfinite()
    stayed = finite | (before == after) | (before.isnan() & after.isnan())
    moved = torch.where(finite, after - before, 0)
    largest, norm = float(moved.abs().max()), float(torch.where(finite, before, 0).norm())
    return largest, float(moved.norm()) / norm if norm else largest, int((~stayed).sum())
