"""Telling who looks at a model of attention that an edit computes in the kernel's place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from fullrank.capture.calls import KernelCall
from fullrank.capture.tap import Tap, recomputing
from fullrank.edit.call import Call

__all__ = ["announced"]

_WHY = "an edit computes its map by something else than one softmax"


def announced(call: Call, run: Callable[[], Tensor]) -> Tensor:
    """What is computed in the kernel's place, seen as one attention call by who looks at the model.

    Where a single kernel or softmax was seen in it, that is the call. Else it is one whose map is not known, so that
    its place is found by what is done to the model afterwards.

    Args:
        call: as all edits made it.
        run: computes the output.

    Returns:
        It.
    """
    if torch.compiler.is_compiling() or recomputing():
        return run()
    taps = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Tap) and not mode.busy]
    if not taps:
        return run()
    with ExitStack() as put_back:
        seen = [(tap, put_back.enter_context(tap.collecting())) for tap in taps]
        output = run()
    for tap, inner in seen:
        if len(inner) == 1:
            tap.hand_on(inner[0])
            continue
        if tap.lineage is not None:
            tap.lineage.see_attention()
        tap.hand_on(_unknown(call, output, tap.marks.of(call.value)))
    return output


def _unknown(call: Call, output: Tensor, sources: int) -> KernelCall:
    weights, logits = (None, None) if call.query is not None else (call.weights, call.logits)
    mask = call.mask if isinstance(call.mask, Tensor) else None
    return KernelCall(
        kernel=call.kernel,
        dtype=output.dtype,
        sources=sources,
        causal=call.causal,
        query=_detached(call.query),
        key=_detached(call.key),
        value=call.value.detach(),
        mask=_detached(mask),
        weights=_detached(weights),
        logits=_detached(logits),
        unknown=_WHY,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
