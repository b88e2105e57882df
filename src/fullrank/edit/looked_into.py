"""`F.multi_head_attention_forward` as Python code that a torch function mode can look into."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fullrank.capture.tap import without_dispatch

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


looked_into = without_dispatch(functional.multi_head_attention_forward)
