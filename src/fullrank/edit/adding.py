"""The torch function mode that makes something else of a block's additions to its stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fullrank.capture.tap import Tap
from fullrank.capture.tensors import first_state
from fullrank.edit.additions import ADD, CARRY, LIKE
from fullrank.edit.checkpointed import Region
from fullrank.edit.looked_into import unflatten
from fullrank.edit.places import Place
from fullrank.errors import EditError

__all__ = ["Adding", "Function", "Sum"]

Function = Callable[[Tensor, Tensor], Tensor]
"""Called with the stream and what is added to it, both (sequences, tokens, width), in place of their sum."""


_IN_PLACE = frozenset({"add_", "__iadd__", "iadd"})


@dataclass(frozen=True)
class Sum:
    """One addition to the stream.

    Attributes:
        branches: names of what is added; several where they are summed first.
        leaves: for each of them the module that returns it, the place in what that returns, and the name again.
    """

    branches: tuple[str, ...]
    leaves: tuple[tuple[str, int | str, str], ...]


class Adding(TorchFunctionMode):
    """Follows what modules return to the addition that takes it up, and makes something else of that.

    Not by the number of the addition among those of the block, nor by the size of its operands: both change with
    batches of one and with other edits. It lives as long as one forward of the block and is entered inside it, as
    `Rewriting` is. A list and identities, not a table of ids: compilers follow that.

    Args:
        function: `X, F → X`.
        place: of the block call.
        shape: of the stream that it is called with.
        wanted: the additions that are meant.
    """

    def __init__(self, function: Function, place: Place, shape: torch.Size, wanted: tuple[Sum, ...]) -> None:
        super().__init__()
        self.left = wanted
        self._function, self._place = function, place
        self._shape = shape  # of the stream now
        self._known: list[tuple[Tensor, tuple[str, ...]]] = []
        self._gone: list[Tensor] = []  # what a sum was to be written into that has another number of tokens
        self._region = None if torch.compiler.is_compiling() else Region()

    def returned(self, path: str, output: Any) -> None:
        """A module returned."""
        for one in self.left:
            for leaf, item, name in one.leaves:
                if leaf == path:
                    tensor = output if isinstance(output, Tensor) else output[item]
                    self._known = [*self._known, (tensor, (name,))]

    def finish(self, output: Any) -> None:
        """The block returned.

        Raises:
            EditError: where an addition was not seen.
        """
        if self.left:
            raise EditError(f"{self._named(self.left[0])} cannot be rewritten: it was not seen in this forward.")
        state = first_state(output)
        if any(state is gone for gone in self._gone):
            raise EditError(self._in_place())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, or what stands in the place of an addition."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.unflatten:
            return unflatten(*args, **kwargs)
        if self._gone and any(item is gone for item in args for gone in self._gone):
            raise EditError(self._in_place())
        if not self._known:
            return func(*args, **kwargs)
        if name in ADD and len(args) == 2:
            one, other = self._find(args[0]), self._find(args[1])
            if one and other:
                output = func(*args, **kwargs)
                self._known = [*self._known, (output, (*one, *other))]
                return output
            names = one or other
            for wanted in self.left:
                if names and set(names) == set(wanted.branches):
                    return self._added(wanted, name, args[0], args[1], 0 if one else 1, kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if (name in CARRY or name in LIKE) and isinstance(output, Tensor):
            for item in args[:1] if name in LIKE else args:
                names = self._find(item)
                if names:
                    self._known = [*self._known, (output, names)]
                    break
        return output

    def _find(self, tensor: Any) -> tuple[str, ...]:
        """Of which branches a tensor is; none for any other."""
        if isinstance(tensor, Tensor):
            for known, names in reversed(self._known):
                if known is tensor:
                    return names
        return ()

    def _added(self, wanted: Sum, name: str, left: Any, right: Any, at: int, kwargs: dict[str, Any]) -> Tensor:
        """What stands in the place of left + right, of which the one at `at` is the branch."""
        where = self._named(wanted)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or kwargs.keys() - {"alpha"}:
            raise EditError(f"{where} cannot be rewritten: it is not one of two tensors alone.")
        if self._region is not None and self._region.left():
            raise EditError(
                f"{where} cannot be rewritten: it is inside a part of the block that the block itself checkpoints; "
                "checkpoint whole blocks, or none."
            )
        operands, target = (left, right), left if name in _IN_PLACE else None
        kind = left.dtype if target is not None else torch.promote_types(left.dtype, right.dtype)
        if target is not None:
            left = left.clone()  # the function, and its gradients, need what is written over
        if "alpha" in kwargs:
            right = right * kwargs["alpha"]
        if left.shape != right.shape:
            left, right = torch.broadcast_tensors(left, right)
        flat = left.ndim != len(self._shape) and left.numel() == self._shape.numel()
        if flat:  # some models flatten the stream
            left, right = left.reshape(self._shape), right.reshape(self._shape)
        X, F = (self._place.tokens(each) for each in ((right, left) if at == 0 else (left, right)))
        new = self._function(X, F)
        if not isinstance(new, Tensor) or new.ndim != 3 or (new.shape[0], new.shape[2]) != (X.shape[0], X.shape[2]):
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise EditError(f"function returned {found} for {where}; {tuple(X.shape)} is needed, or other tokens.")
        state = self._laid_out(new.to(kind), left, where)
        self.left = tuple(one for one in self.left if one is not wanted)
        self._known = [each for each in self._known if each[1][0] not in wanted.branches]
        self._shape = state.shape
        if flat:
            state = state.reshape(-1, state.shape[-1])
        if target is not None and state.shape == target.shape:
            state = target.copy_(state)
        elif target is not None:
            self._gone = [*self._gone, target]
        _tell(operands, state)
        return state

    def _named(self, one: Sum) -> str:
        return f"the addition of {' and '.join(one.branches)} in {self._place.path}"

    def _in_place(self) -> str:
        return (
            f"function made another number of tokens in {self._place.path}, and the block goes on with the tensor that "
            "it meant to write its sum into."
        )

    def _laid_out(self, new: Tensor, like: Tensor, where: str) -> Tensor:
        """(sequences, tokens, width) in the model's layout, also where the number of tokens is another."""
        layout = self._place.layout
        if new.numel() == like.numel():
            return layout.back(new, like)
        if layout.axes != "samples" and like.ndim == 3:
            return new.transpose(0, 1) if layout.tokens_first else new
        if layout.axes != "samples" and like.ndim == 2:
            return new.squeeze(0)
        raise EditError(f"{where} cannot have another number of tokens: the stream is {tuple(like.shape)}.")


def _tell(operands: tuple[Tensor, Tensor], total: Tensor) -> None:
    """For whoever follows the stream now, it is still the sum of the two."""
    if torch.compiler.is_compiling():
        return
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, Tap) and not mode.busy:
            for trace in mode.traces:
                trace.see("add", operands, total)
