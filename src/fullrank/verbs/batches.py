"""What a model is called with, in the one form that the verbs use."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.documents import Documents
from fullrank.capture.own_copy import own_copy
from fullrank.errors import BatchError
from fullrank.spec.subject import device_of
from fullrank.verbs.cached import without_past

__all__ = ["Call", "as_calls"]


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        real: (sequences, tokens) which tokens are real, by stack where the stacks differ; None when all are.
        token_ids: (sequences, tokens) for a model that reads them.
        past: whether earlier tokens come from a cache.
        documents: how rows come apart that hold several documents; None where they hold one each.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: Tensor | dict[str, Tensor] | None
    token_ids: Tensor | None
    past: bool = False
    documents: Documents | None = None

    def run(self, model: nn.Module) -> Any:
        """Call the model; a cache among the arguments is copied first, so that it stays as long as it was."""
        return model(*map(own_copy, self.args), **{name: own_copy(value) for name, value in self.kwargs.items()})

    @property
    def decodes(self) -> bool:
        """Whether it is one decoding step: one new token per sequence after those of a cache."""
        return self.past and any(value.ndim > 1 and value.shape[1] == 1 for value in self.tensors)

    def for_survey(self) -> Call:
        """The call whose forward shows where the blocks are: a decoding step becomes a prefill of two tokens."""
        if not self.decodes:
            return self
        args, kwargs = without_past(self.args, self.kwargs)
        return replace(self, args=args, kwargs=kwargs, real=None, past=False)

    @property
    def divisible(self) -> bool:
        """Whether its sequences can be run one by one: every tensor has them first, and nothing else holds tensors."""
        if self.past or self.documents is not None or self.sequences < 1:
            return False
        plain = all(isinstance(v, Tensor | str | int | float | None) for v in (*self.args, *self.kwargs.values()))
        return plain and all(v.ndim == 0 or v.shape[0] == self.sequences for v in self.tensors)

    def part(self, start: int, stop: int) -> Call:
        """Some of its sequences."""
        masks = self.real.items() if isinstance(self.real, dict) else []
        real = {name: mask[start:stop] for name, mask in masks} or (
            self.real[start:stop] if isinstance(self.real, Tensor) else None
        )
        return replace(
            self,
            args=tuple(_rows(value, start, stop) for value in self.args),
            kwargs={name: _rows(value, start, stop) for name, value in self.kwargs.items()},
            real=real,
            token_ids=None if self.token_ids is None else self.token_ids[start:stop],
        )

    def describe(self) -> str:
        """Names and shapes of the arguments, for messages."""
        named = [(f"argument {i}", value) for i, value in enumerate(self.args)] + list(self.kwargs.items())
        return ", ".join(f"{name} {tuple(v.shape)}" for name, v in named if isinstance(v, Tensor)) or "no tensors"

    @property
    def sequences(self) -> int:
        """How many sequences the call carries: the first dimension of its first tensor."""
        return next((v.shape[0] for v in self.tensors if v.ndim), 0)

    @property
    def tokens(self) -> int | None:
        """How many real tokens the call carries; None where only the model knows (patches of an image)."""
        mask = next(iter(self.real.values()), None) if isinstance(self.real, dict) else self.real
        if mask is not None:
            return int(mask.sum())
        return None if self.token_ids is None else self.token_ids.numel()

    @property
    def tensors(self) -> list[Tensor]:
        """Its arguments that are tensors, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def as_calls(
    model: nn.Module, batch: Any, mask: Tensor | None = None, *, known: Sequence[Tensor | None] | None = None
) -> list[Call]:
    """The calls that a batch stands for.

    Args:
        model: what will be called; tensors are moved to its device and `use_cache=False` is passed where it is known.
        batch: a mapping (keyword arguments), a tuple (positional ones), a tensor (the only one), or an iterable of
            these.
        mask: (sequences, tokens), which tokens are real; by default `attention_mask` of the batch.
        known: for each batch, which tokens are real, where the batch itself does not say so.

    Returns:
        At least one call.

    Raises:
        BatchError: for an empty iterable, a mask that does not fit or leaves nothing to measure, or something that is
            no batch.
    """
    if isinstance(batch, Mapping | tuple | Tensor):
        batches = [batch]
    elif isinstance(batch, str | bytes) or not isinstance(batch, Iterable):
        raise BatchError(
            f"batch={type(batch).__name__} is no batch: pass a mapping, a tuple, a tensor, or an iterable of these."
        )
    else:
        batches = list(batch)
    if not batches:
        raise BatchError("batch is an empty iterable: there is nothing to examine.")
    if mask is not None and len(batches) > 1:
        raise BatchError(f"mask= goes with one batch, and {len(batches)} were passed; put attention_mask in each.")
    told = known or [None] * len(batches)
    return [_call(model, one, mask, real) for one, real in zip(batches, told, strict=True)]


def _call(model: nn.Module, batch: Any, mask: Tensor | None, known: Tensor | None) -> Call:
    device = device_of(model)
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
    signature = inspect.signature(model.forward)
    if "use_cache" in signature.parameters and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    named = _named(signature, args, kwargs)
    real = _real(named, mask if mask is None else mask.to(device), known)
    ids = _token_ids(model, named, args)
    cached = named.get("past_key_values") is not None  # then the mask covers earlier tokens too
    if cached and isinstance(real, Tensor) and ids is not None:
        real = real[:, -ids.shape[1] :]  # of the keys before them, the mask of the kernel's call tells
    read = real.get("encoder") if isinstance(real, dict) else real
    if read is not None and ids is not None and read.shape != ids.shape and not cached:
        raise BatchError(f"the mask has the shape {tuple(read.shape)}; the batch's tokens have {tuple(ids.shape)}.")
    for one in real.values() if isinstance(real, dict) else [real]:
        _check(one, fewest=1 if cached else 2)
    if ids is not None and ids.shape[1] == 1 and not cached:
        raise BatchError("every sequence has one token: at least two are needed to compare tokens.")
    documents = None
    if ids is not None and not cached:
        documents = Documents.of(_matrix(named.get("position_ids")), (ids.shape[0], ids.shape[1]), read)
    return Call(args, kwargs, real, ids, past=cached, documents=documents)


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the model's forward gives them; those passed by name where they do not fit."""
    try:
        bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:
        return dict(kwargs)  # the model will say so itself when it is called
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


def _real(named: dict[str, Any], mask: Tensor | None, known: Tensor | None) -> Tensor | dict[str, Tensor] | None:
    if mask is not None and mask.ndim != 2:
        raise BatchError(
            f"the mask has the shape {tuple(mask.shape)}; expected (sequences, tokens), True for real tokens."
        )
    padding = _matrix(named.get("src_key_padding_mask"))  # torch's own modules: True is hidden
    given = mask if mask is not None else _matrix(named.get("attention_mask"))
    if given is None:
        given = ~padding if padding is not None and padding.dtype == torch.bool else known
    given = given.bool() if given is not None else None
    if "decoder_input_ids" not in named:
        return given
    theirs = _matrix(named.get("decoder_attention_mask"))
    masks = {"encoder": given, "decoder": theirs.bool() if theirs is not None else known}
    return {stack: one for stack, one in masks.items() if one is not None} or None


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def _token_ids(model: nn.Module, named: dict[str, Any], args: tuple[Any, ...]) -> Tensor | None:
    """What the model reads as tokens: its main input, or the only positional argument; None for pixels and sound."""
    main = getattr(model, "main_input_name", "input_ids")
    value = named.get(main, args[0] if args else None)
    ids = _matrix(value)
    return ids if ids is not None and not ids.is_floating_point() and ids.dtype != torch.bool else None


def _check(real: Tensor | None, *, fewest: int) -> None:
    if real is None:
        return
    count = real.sum(-1)
    empty = (count == 0).nonzero()
    if empty.numel():
        raise BatchError(f"all tokens of sequence {int(empty[0])} are masked: there is nothing to measure in it.")
    single = (count == 1).nonzero()
    if single.numel() and fewest > 1:
        raise BatchError(f"sequence {int(single[0])} has one token: at least two are needed to compare tokens.")


def _rows(value: Any, start: int, stop: int) -> Any:
    return value[start:stop] if isinstance(value, Tensor) and value.ndim else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
