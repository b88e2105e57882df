"""What a model is called with, in the one form that the verbs use."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import BatchError

__all__ = ["Call", "as_calls"]


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        real: (sequences, tokens) which tokens are real, by stack where the stacks differ; None when all are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: Tensor | dict[str, Tensor] | None

    def run(self, model: nn.Module) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)

    def describe(self) -> str:
        """Names and shapes of the arguments, for messages."""
        named = [(f"argument {i}", value) for i, value in enumerate(self.args)] + list(self.kwargs.items())
        return ", ".join(f"{name} {tuple(v.shape)}" for name, v in named if isinstance(v, Tensor)) or "no tensors"

    @property
    def sequences(self) -> int:
        """How many sequences the call carries: the first dimension of its first tensor."""
        return next((v.shape[0] for v in self._tensors() if v.ndim), 0)

    @property
    def tokens(self) -> int:
        """How many real tokens the call carries, counted by its mask, else by the first tensor's second dimension."""
        mask = next(iter(self.real.values()), None) if isinstance(self.real, dict) else self.real
        if mask is not None:
            return int(mask.sum())
        first = next((v for v in self._tensors() if v.ndim >= 2), None)
        return first.shape[0] * first.shape[1] if first is not None and first.ndim <= 3 else 0

    @property
    def token_ids(self) -> Tensor | None:
        """The token ids, (sequences, tokens): the first integer matrix; None for a model that reads none."""
        whole = (v for v in self._tensors() if v.ndim == 2 and not v.is_floating_point() and v.dtype != torch.bool)
        return next(whole, None)

    def _tensors(self) -> list[Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def as_calls(model: nn.Module, batch: Any, mask: Tensor | None = None) -> list[Call]:
    """The calls that a batch stands for.

    Args:
        model: what will be called; tensors are moved to its device and `use_cache=False` is passed where it is known.
        batch: a mapping (keyword arguments), a tuple (positional ones), a tensor (the only one), or an iterable of
            these.
        mask: (sequences, tokens), which tokens are real; by default `attention_mask` of the batch.

    Returns:
        At least one call.

    Raises:
        BatchError: for an empty iterable, a mask that leaves nothing to measure, or something that is no batch.
    """
    if isinstance(batch, Mapping | tuple | Tensor):
        return [_call(model, batch, mask)]
    if isinstance(batch, str | bytes) or not isinstance(batch, Iterable):
        raise BatchError(
            f"batch={type(batch).__name__} is no batch: pass a mapping, a tuple, a tensor, or an iterable of these."
        )
    calls = [_call(model, one, mask) for one in batch]
    if not calls:
        raise BatchError("batch is an empty iterable: there is nothing to examine.")
    return calls


def _call(model: nn.Module, batch: Any, mask: Tensor | None) -> Call:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(name): _moved(value, device) for name, value in batch.items()}
    elif isinstance(batch, tuple):
        args = tuple(_moved(value, device) for value in batch)
    elif isinstance(batch, Tensor):
        args = (_moved(batch, device),)
    else:
        raise BatchError(f"a batch of type {type(batch).__name__} is none: pass a mapping, a tuple or a tensor.")
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    real = _real(kwargs, mask, device)
    for one in real.values() if isinstance(real, dict) else [real]:
        _check(one)
    call = Call(args, kwargs, real)
    if call.token_ids is not None and call.token_ids.shape[1] == 1:
        raise BatchError("every sequence has one token: at least two are needed to compare tokens.")
    return call


def _real(kwargs: dict[str, Any], mask: Tensor | None, device: torch.device) -> Tensor | dict[str, Tensor] | None:
    given = mask.to(device) if mask is not None else kwargs.get("attention_mask")
    given = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
    if "decoder_input_ids" not in kwargs:
        return given
    theirs = kwargs.get("decoder_attention_mask")
    masks = {"encoder": given, "decoder": theirs.bool() if isinstance(theirs, Tensor) else None}
    return {stack: one for stack, one in masks.items() if one is not None} or None


def _check(real: Tensor | None) -> None:
    if real is None:
        return
    count = real.sum(-1)
    empty = (count == 0).nonzero()
    if empty.numel():
        raise BatchError(f"all tokens of sequence {int(empty[0])} are masked: there is nothing to measure in it.")
    single = (count == 1).nonzero()
    if single.numel():
        raise BatchError(f"sequence {int(single[0])} has one token: at least two are needed to compare tokens.")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
