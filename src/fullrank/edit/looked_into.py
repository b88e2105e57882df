"""`F.multi_head_attention_forward` as Python code that a torch function mode can look into."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Passing", "looked_into", "unflatten"]


class Passing(TorchFunctionMode):
    """A mode that changes nothing. Modules of torch with a fused path leave it while any mode is active."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function."""
        if func is Tensor.unflatten:
            return unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def unflatten(tensor: Tensor, dim: int, sizes: Any) -> Tensor:
    """`Tensor.unflatten`, which is Python code that calls its parent's: compilers do not follow that inside a mode."""
    dim = dim % tensor.ndim
    return tensor.view(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def _no_modes(tensors: Any) -> bool:
    return False


def _without_dispatch(func: Any) -> Any:
    """The same code without its first question, whether a mode wants to see the call: to look into it, once."""
    names = func.__globals__ | {"has_torch_function": _no_modes}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


looked_into = _without_dispatch(functional.multi_head_attention_forward)
