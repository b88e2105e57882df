"""Taking a model off paths on which nothing can be seen, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["module_names", "reference_path"]

FAST_PATH = (
    "reference path: the fused fast path of nn.TransformerEncoder and nn.MultiheadAttention was switched off while "
    "looking; it differs by rounding, and returns zeros at padded tokens."
)
COMPILED = "reference path: the compiled model was run without compilation while looking; the two differ by rounding."


@contextmanager
def reference_path(model: nn.Module, notes: list[str]) -> Iterator[AbstractContextManager[None] | None]:
    """Inside, no fused encoder layers and no compiled graphs are run; afterwards the switches are as they were.

    Args:
        model: the model that is looked at.
        notes: gets a sentence for each path that this model is taken off.

    Yields:
        The stance that keeps the compiler away, to be left and entered again around a kernel that stays compiled.
    """
    with ExitStack() as put_back:
        stance = None
        fast = torch.backends.mha.get_fastpath_enabled()
        put_back.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if fast and any(
            isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention) for module in model.modules()
        ):
            notes.append(FAST_PATH)
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and importing it takes a second
            stance = torch.compiler.set_stance("force_eager")
            put_back.enter_context(stance)
            if _compiled(model):
                notes.append(COMPILED)
        yield stance


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Names of all modules, without the prefix that `torch.compile` adds; a shared module has its first name."""
    return {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}


def _compiled(model: nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return any(
        isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
