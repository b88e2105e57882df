"""The tensors that stand for a model's parameters while it runs: under sharding, others than it has by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from fullrank.capture.wrappers import is_sharded

__all__ = ["taking_part"]


@contextmanager
def taking_part(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, a forward fills in which tensors stood for the parameters.

    A sharded model's parameters are pieces, and no part of the graph: in its forward each module holds whole ones,
    gathered from all processes. A gradient that is asked for with respect to a whole one is that of this process's part
    of the batch, and nothing is sent and no `.grad` is written in getting it.

    Args:
        model: the model.
        parameters: by name.

    Yields:
        The same by name where the model is not sharded; else, after a forward, the whole ones that took part in it.
    """
    if not is_sharded(model):
        yield dict(parameters)
        return
    seen: dict[str, nn.Parameter] = {}
    found: dict[int, str] = {}  # by tensor: one that several modules share has its first name
    handles = []

    def look(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}".removeprefix(".")
            if parameter is None or not parameter.requires_grad or hasattr(parameter, "device_mesh"):
                continue
            if full in parameters and found.setdefault(id(parameter), full) == full:
                seen[full] = parameter

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(look, path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
