"""Which added parameters have a part in what a model answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.capture.wrappers import is_sharded
from fullrank.remedies.applying.answer import answer_of, floating_in, same
from fullrank.remedies.penalty import Penalty, penalty_of

__all__ = ["unheard"]

_STIRS = (0.1, 1.0, 10.0)
"""Of added parameters, one after the other until all are heard: some start so low that half precision does not see a
small change, and what is large may overflow."""

Forward = Callable[[], Any]
Named = Mapping[str, nn.Parameter]


def unheard(
    model: nn.Module, forward: Forward, after: Tensor, added: Named, others: Sequence[nn.Parameter] = ()
) -> list[str]:
    """Names of added parameters without a part in the output, or in a penalty that stands beside it.

    All are stirred, so that none hides behind another that is 0, and those with a gradient of a random projection of
    the output are heard. The rest is stirred by itself, in groups that are halved where the output moves. Where a
    backward pass is not possible, all are said to be heard as soon as stirring all of them moves the output.

    Args:
        model: the model.
        forward: one forward pass.
        after: what it returns, as `answer_of` gives it.
        added: the parameters.
        others: parameters that hide them where they are 0; they are stirred where some stay unheard.

    Returns:
        Names, in the order of `added`.
    """
    left = _silent(model, forward, after, added, added)
    if left and others:
        with _stirred(others, _STIRS[0]):
            left = _silent(model, forward, answer_of(model, forward), added, left)
    return list(left)


def _silent(model: nn.Module, forward: Forward, after: Tensor, added: Named, asked: Named) -> Named:
    """Those of `asked` that are not heard while all that were added are stirred."""
    left, differentiated = dict(asked), False
    for size in _STIRS:
        with _stirred(list(added.values()), size):
            heard = _with_gradient(model, forward, left)
        if heard is None:
            continue
        differentiated = True
        left = {name: p for name, p in left.items() if name not in heard}
        if not left:
            return left
    for size in _STIRS:
        with _stirred(list(added.values()), size):
            moved = answer_of(model, forward)
            if differentiated:
                left = _still(model, forward, moved, left, size)
            elif not same(moved, after):
                return {}
    return left


def _still(model: nn.Module, forward: Forward, now: Tensor, group: Named, size: float) -> dict[str, nn.Parameter]:
    """Those of a group that leave the output as it is however they are stirred; no gradient was seen of any."""
    if not group:
        return {}
    with _stirred(list(group.values()), size, seed=1, turned=True):
        if same(answer_of(model, forward), now):
            return dict(group)
    if len(group) == 1:
        return {}
    items = list(group.items())
    halves = (dict(items[: len(items) // 2]), dict(items[len(items) // 2 :]))
    return {name: p for half in halves for name, p in _still(model, forward, now, half, size).items()}


def _with_gradient(model: nn.Module, forward: Forward, asked: Named) -> set[str] | None:
    """Names of parameters whose gradient of a random projection of the output is not 0.

    Returns:
        None where no backward pass is possible: through kernels that have none, of a forward that keeps no history, of
        sharded weights, or where gradients are not finite.
    """
    if is_sharded(model):
        return None
    own = {id(p) for p in asked.values()}
    try:
        with undisturbed(model), _uncompiled(), torch.enable_grad():
            for p in model.parameters():  # history begins at the first of them: nothing before it is kept in memory
                p.requires_grad_(id(p) in own)
            answer = next(floating_in(forward()), None)
            terms = [penalty_of(model)] if answer is None else [_projected(answer), penalty_of(model)]
            outputs = [term for term in terms if term.requires_grad]
            if not outputs:
                return None
            found = torch.autograd.grad(outputs, list(asked.values()), allow_unused=True)
            if not all(bool(g.isfinite().all()) for g in found if g is not None):
                return None
            return {name for name, g in zip(asked, found, strict=True) if g is not None and bool((g != 0).any())}
    except Exception:  # noqa: BLE001 - whatever kernels and hooks say of a pass that they were not made for
        return None
    finally:
        for one in model.modules():
            if isinstance(one, Penalty):
                one.forget()


def _projected(answer: Tensor) -> Tensor:
    """uᵀ Y w of what is finite in an answer Y, (…, width) taken as a matrix, with normal u and w."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.promote_types(answer.dtype, torch.float32)
    Y = torch.where(answer.isfinite(), answer, 0).to(dtype).reshape(-1, answer.shape[-1])
    u, w = (torch.randn(number, generator=generator).to(Y.device, dtype) for number in Y.shape)
    return u @ (Y @ w)


@contextmanager
def _stirred(parameters: Sequence[nn.Parameter], size: float, *, seed: int = 0, turned: bool = False) -> Iterator[None]:
    """Other values for a while; `turned` to the other side of 0, for what acts in steps."""
    generator = torch.Generator().manual_seed(seed)
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                value = torch.where(torch.isfinite(p), p, torch.zeros_like(p))
                p.copy_((-2 * value if turned else value) + size * noise)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def _uncompiled() -> Any:
    """Compiled models run as they are written: a graph with a backward pass would be made for this one call."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
