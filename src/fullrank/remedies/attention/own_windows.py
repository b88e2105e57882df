"""Windows that a model has of its own: later queries do not see what earlier ones saw."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.edit import Call, rewrite_attention
from fullrank.edit.places import module_at
from fullrank.errors import EditError
from fullrank.remedies.attention.scores import seen_in
from fullrank.remedies.patient import Patient

__all__ = ["own_windows", "shown_at_most"]


def own_windows(patient: Patient) -> dict[str, int]:
    """The modules whose causal attention has a window of its own, and how many keys it shows.

    It is seen in one forward; where the batch is too short for that, it is what the module or its settings state to
    kernels as `sliding_window`.

    Args:
        patient: the model.

    Returns:
        The smallest by the path of the module. Packed documents and chunks count: they hide what was seen too.
    """
    found: dict[str, int] = {}

    def look(call: Call) -> Call:
        path = call.place.path
        module = module_at(patient.model, path)
        stated = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
        try:
            seen = seen_in(call)
        except EditError:  # its mask is code
            seen = None
        shown = None if seen is None or call.queries != call.keys else shown_at_most(seen)
        numbers = [one for one in (shown, call.window, stated) if isinstance(one, int) and one > 0]
        if numbers:
            found[path] = min([*numbers, *([found[path]] if path in found else [])])
        return call

    edit = rewrite_attention(patient.model, patient.anatomy, before=look)
    with edit, undisturbed(patient.model), torch.no_grad():
        patient.forward()
    return found


def shown_at_most(seen: Tensor) -> int | None:
    """How many keys a query sees at most where later queries do not see what earlier ones saw.

    Args:
        seen: (batch, heads, T, T), which keys a query sees. Queries that see later keys are left out: those of padding,
            and those of models that are not causal.

    Returns:
        None where everything that was seen once is seen by all later queries that see anything.
    """
    ahead = seen.triu(1).any(-1, keepdim=True)
    seen = seen & ~ahead
    once = seen.to(torch.uint8).cummax(-2).values.bool()
    lost = once & ~seen & seen.any(-1, keepdim=True)
    return int(seen.sum(-1).max()) if bool(lost.any()) else None
