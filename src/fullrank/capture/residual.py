"""The residual additions of one block call: which state lies between attention and MLP, and what the norms hand on.

Inside a block a state is known only as the tensor object that goes into the next addition. Starting from the tensor the
block is called with, every addition with a known state as one of its operands makes the next state; norms, casts and
dropout of a state are noted with it. The block's output leads back to its last addition, and the other operand of that
one, if an attention call made it and something else read it, is the state between attention and MLP. Where the chain
cannot be followed nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Followed", "ResidualTrace"]

ADD = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_SAME = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
    | {"dropout", "dropout_", "clamp", "clamp_", "view", "reshape", "nan_to_num", "identity"}
)
_SCALE = frozenset({"mul", "__mul__", "__rmul__"})
_NORM = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm"})


@dataclass(eq=False)
class _State:
    """A tensor that is a state of the stream, or a norm's output of one."""

    value: Tensor
    kind: Literal["input", "sum", "norm"]
    order: int  # additions since the block's input
    attention: int  # attention calls before it was made
    of: _State | None = None  # sum: the state it was added to; norm: the state it is of
    read: bool = False  # something other than an addition used it
    version: int = -1  # of the tensor when it was made; a later one means that it was overwritten

    @property
    def intact(self) -> bool:
        return self.value.is_inference() or self.value._version == self.version


@dataclass(frozen=True)
class Followed:
    """What one block call was seen to do; None where it cannot be told.

    Attributes:
        mid: the state between attention and MLP.
        live_mid: the same as the model holds it; it may have lost its tokens' axis there.
        read_input: what a norm made of the block's input.
        read_mid: what a norm made of `mid`.
    """

    mid: Tensor | None = None
    read_input: Tensor | None = None
    read_mid: Tensor | None = None
    live_mid: Tensor | None = None


class ResidualTrace:
    """Follows the states of one block call.

    Args:
        stream: the tensor that the block is called with.
    """

    def __init__(self, stream: Tensor) -> None:
        self._shape = stream.shape
        self._known: dict[int, _State] = {}
        self._norms: list[_State] = []
        self.attention = 0
        self._input = _State(stream, "input", 0, 0, version=_version(stream))
        self._aliases: list[Tensor] = []  # keeps ids from being reused while the block runs
        self._known[id(stream)] = self._input

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take in one function call of the block."""
        states = [state for item in args if (state := self._state(item)) is not None]
        if not states:
            return
        if name in ADD and isinstance(output, Tensor) and self._is_stream(output):
            operand = max(states, key=lambda state: state.order)
            self._keep(_State(output, "sum", operand.order + 1, self.attention, operand))
        elif name in _SAME and isinstance(output, Tensor) and (state := self._state(args[0])) is not None:
            if id(output) not in self._known and output.numel() == state.value.numel():
                self._known[id(output)] = state
                self._aliases.append(output)
        elif name in _SCALE and isinstance(output, Tensor) and self._weighted(args, output):
            self._known[id(output)] = states[0]
            self._aliases.append(output)
        elif name in _NORM:
            self.see_norm(args[0], output)
        else:
            for state in states:
                state.read = True

    def overwrites(self, name: str, args: tuple[Any, ...]) -> None:
        """Called before a function runs: an addition in place is about to destroy a state that may be wanted."""
        if name in ("add_", "__iadd__") and args and isinstance(args[0], Tensor):
            state = self._state(args[0])
            if state is not None and state.value is args[0] and state.kind != "input":
                state.value = args[0].detach().clone()  # no part of the model: it must not enter the graph
                state.version = _version(state.value)

    def see_norm(self, given: Any, output: Any) -> None:
        """Take in a norm, function or module."""
        state = self._state(given)
        if state is None or not isinstance(output, Tensor) or id(output) in self._known or state.kind == "norm":
            return
        state.read = True
        norm = _State(output, "norm", state.order, state.attention, state)
        self._keep(norm)
        if self._is_stream(output):
            self._norms.append(norm)

    def finish(self, output: Tensor) -> Followed:
        """What was seen, given the state that the block returned.

        Returns:
            The state between attention and MLP and what the norms handed on.
        """
        read_input = self._normed(self._input)
        mid = self._between(output)
        if mid is None:
            return Followed(read_input=read_input)
        return Followed(mid.value.reshape(self._shape), read_input, self._normed(mid), mid.value)

    def adds_to_input(self, output: Tensor | None) -> bool:
        """Whether what the block returned is a sum that its input entered, or a norm of one."""
        state = self._state(output)
        return state is not None and state.order > 0

    def _weighted(self, args: tuple[Any, ...], output: Tensor) -> bool:
        """Whether a state is multiplied by a number or by a parameter of one value per channel: αx + f(x) adds to x."""
        others = [item for item in args if self._state(item) is None]
        weights = all(not isinstance(w, Tensor) or w.ndim == 0 or (_is_parameter(w) and w.ndim == 1) for w in others)
        return len(others) == 1 and weights and self._is_stream(output)

    def _normed(self, state: _State) -> Tensor | None:
        found = next((norm.value for norm in self._norms if norm.of is state and norm.intact), None)
        return None if found is None else found.reshape(self._shape)

    def _is_stream(self, tensor: Tensor) -> bool:
        # (sequences · tokens, width) is the same stream: some models flatten it for their MLP
        return tensor.shape[-1:] == self._shape[-1:] and tensor.numel() == self._shape.numel()

    def _between(self, output: Tensor) -> _State | None:
        last = self._known.get(id(output))
        if last is not None and last.kind == "norm":
            last = last.of
        if last is None or last.kind != "sum" or last.of is None:
            return None
        mid = last.of
        attention_made_it = mid.attention > 0 and mid.attention == last.attention
        if mid.order < 1 or not attention_made_it or not mid.read or not mid.intact:
            return None
        return mid

    def _state(self, item: Any) -> _State | None:
        return self._known.get(id(item)) if isinstance(item, Tensor) else None

    def _keep(self, state: _State) -> None:
        state.version = _version(state.value)
        self._known[id(state.value)] = state
        self._aliases.append(state.value)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm: its class says so and it holds no other module, as a `PreNorm` wrapper does."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None
