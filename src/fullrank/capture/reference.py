"""Taking a model off paths on which nothing can be seen, and back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["COMPILED", "FAST_PATH", "module_at", "module_names", "reference_path"]

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
    fast, stance = _SWITCHES.take()
    try:
        if fast and any(
            isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention) for module in model.modules()
        ):
            notes.append(FAST_PATH)
        if stance is not None and _compiled(model):
            notes.append(COMPILED)
        yield stance
    finally:
        _SWITCHES.give_back()


class _Switches:
    """The switches of the whole process: several threads share them, and the last to leave puts them back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._taken = 0
        self._fast = False
        self._stance: AbstractContextManager[None] | None = None
        self._put_back = ExitStack()

    def take(self) -> tuple[bool, AbstractContextManager[None] | None]:
        """Whether the fast path was on before anyone took it, and the stance."""
        with self._lock:
            if self._taken == 0:
                self._fast = torch.backends.mha.get_fastpath_enabled()
            if self._stance is None and "torch._dynamo" in sys.modules:
                # else nothing can be compiled, and importing it takes a second
                self._stance = torch.compiler.set_stance("force_eager")
                self._put_back.enter_context(self._stance)
            torch.backends.mha.set_fastpath_enabled(False)
            self._taken += 1
            return self._fast, self._stance

    def give_back(self) -> None:
        """Leave; the last to do so puts back what was there before the first."""
        with self._lock:
            self._taken -= 1
            if self._taken == 0:
                self._stance = None
                self._put_back.close()
                torch.backends.mha.set_fastpath_enabled(self._fast)


_SWITCHES = _Switches()


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Names of all modules, without the prefix that `torch.compile` adds; a shared module has its first name."""
    return {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of that name, as `module_names` says it; None where there is none. Costs the depth of the path."""
    found: nn.Module | None = model
    for part in (*path.split("."), "") if path else ("",):
        while found is not None and "_orig_mod" in found._modules:
            found = found._modules["_orig_mod"]
        if part:
            found = None if found is None else found._modules.get(part)
    return found


def _compiled(model: nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return any(
        isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
