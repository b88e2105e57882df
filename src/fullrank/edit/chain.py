"""Several edits of one attention call: what each sees of what the others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fullrank.edit.call import Call
from fullrank.edit.places import Place
from fullrank.errors import EditError

if TYPE_CHECKING:
    from fullrank.edit.rewriting import Rewriting

__all__ = ["Chain", "settled"]


class Chain:
    """All edits of one attention call: their `before` in the order in which they were made, their `after` backwards.

    Args:
        running: what is rewriting calls of the module now, outermost first.
    """

    def __init__(self, running: Sequence[Rewriting]) -> None:
        self._taken: list[tuple[Rewriting, Place]] = []
        for mode in reversed(running):
            place = mode.take()
            if place is not None:
                self._taken.append((mode, place))

    @property
    def place(self) -> Place | None:
        """Where the call is; None where no edit wants it."""
        return self._taken[0][1] if self._taken else None

    @property
    def changes_output(self) -> bool:
        """Whether anything acts after the kernel."""
        return any(mode.after is not None for mode, _ in self._taken)

    def begin(self, call: Call, settle: Callable[[Call, Call], Call]) -> Call:
        """The call as all edits make it.

        Args:
            call: as the model makes it.
            settle: from a call before and after an edit, what the next one sees.

        Returns:
            It.

        Raises:
            EditError: where two of them replace the kernel, or one changes scores after another replaced their map.
        """
        own = call.weights  # the map of a model that softmaxes by itself
        attend = None
        for mode, place in self._taken:
            shown = call.change(place=place)
            changed = mode.begin(shown)
            mapped = changed.weights is not shown.weights
            if attend is not None and (changed.attend is not None or mapped):
                raise EditError(_TWICE.format(path=mode.path))
            if changed.attend is not None and shown.weights is not None:
                raise EditError(_TWICE.format(path=mode.path))
            replaced = shown.weights is not own
            if replaced and not mapped and _other_scores(shown, changed):
                raise EditError(
                    f"an edit changes the scores of attention in {mode.path}, and another edit replaced their map "
                    "already: the change would do nothing; make the edit that replaces the map last."
                )
            attend = changed.attend or attend
            call = settle(shown, changed).change(attend=None)
            own = own if mapped or replaced else call.weights
        return call.change(attend=attend, replaced=call.weights is not own)

    def end(self, call: Call, output: Tensor) -> Tensor:
        """What all edits make of the output, each seeing the call as it was made in the end."""
        call = call.change(output=output)
        for mode, place in reversed(self._taken):
            output = mode.end(call.change(place=place, input=mode.given), output)
            if output.shape[-1] < call.value.shape[-1]:  # what an edit had added to the values is cut off again
                call = call.change(value=call.value[..., : output.shape[-1]])
        return output


_TWICE = "attention in {path} is computed in the kernel's place by another edit already; only one can do that."


def _other_scores(call: Call, changed: Call) -> bool:
    same = all(getattr(changed, name) is getattr(call, name) for name in ("query", "key", "logits"))
    return not same or changed.scale != call.scale or changed.changed_mask(call)


def settled(call: Call, changed: Call, *, keep_bias: bool = False) -> Call:
    """A call of a kernel as the next edit sees it: what is added to its scores is in one mask.

    Args:
        call: before an edit.
        changed: after it.
        keep_bias: where the kernel takes biases beside its mask.

    Returns:
        The call.
    """
    if not changed.changed_mask(call) or (keep_bias and changed.mask is call.mask and changed.causal == call.causal):
        return changed
    bias = changed.bias if keep_bias else None
    added = changed.change(bias=None).additive() if keep_bias else changed.additive()
    mask = None if added is None else added[(None,) * (4 - added.ndim)]
    return changed.change(mask=mask, causal=changed.causal and mask is None, bias=bias)
