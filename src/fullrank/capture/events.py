"""What capture sees, one immutable event at a time, and what an observer must be able to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from fullrank.operators import AttentionMap
from fullrank.table import Row

__all__ = [
    "AttentionCall",
    "Backward",
    "Event",
    "GradientState",
    "Observer",
    "ParameterGradient",
    "Signal",
    "StreamState",
]

Signal = Literal["stream", "mid", "read", "attention", "gradient"]
"""What an observer can ask for: block inputs and outputs, the state between attention and MLP, what a norm hands on
to a block, attention calls, gradients of all these. The recorder attaches nothing that no observer needs."""


@dataclass(frozen=True)
class StreamState:
    """The residual stream at one place, or what a norm hands on of it.

    Attributes:
        stack: `decoder`, `encoder`, `vision`, …
        layer: 0 before the first block, n after (or, for `mid`, inside) the n-th block call. A `read` carries the layer
            of the state that was read: block n's first norm reads layer n − 1 `out`, its MLP norm layer n `mid`.
        site: `stream`, or `read` for what a norm hands on.
        part: `out`, or `mid` between attention and MLP.
        path: name of the module it was seen at.
        value: (sequences, tokens, width), detached, not to be changed.
        real: (sequences, tokens) bool, which tokens are not padding; None when all are.
        over: `samples` where an item of the batch is one vector: then the samples of the batch stand in the place of
            the tokens, and `value` is (1, samples, width), all features of a sample being its width.
    """

    stack: str
    layer: int
    site: Literal["stream", "read"]
    part: Literal["out", "mid"]
    path: str
    value: Tensor
    real: Tensor | None = None
    over: Literal["tokens", "samples"] = "tokens"


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention kernel, as the model made it.

    Attributes:
        stack: as in `StreamState`.
        layer: n for a call inside the n-th block call.
        part: `self`, `cross`, `self.1` for a second self-attention call of the block, …
        path: name of the module that called.
        attention: the map over tokens, (sequences, heads, queries, keys), never materialised unless the model did.
        value: (sequences, key-value heads, keys, width of values) as handed to the kernel; None where unknown.
        real_queries: (sequences, queries) bool; None when all are real tokens.
        real_keys: (sequences, keys) bool; None when all are real tokens.
        causal: whether every query sees no later key.
        kernel: what the model called, such as `scaled_dot_product_attention` or `softmax`.
        dtype: of the query as the kernel got it (under autocast: as it computes).
    """

    stack: str
    layer: int
    part: str
    path: str
    attention: AttentionMap
    value: Tensor | None
    real_queries: Tensor | None
    real_keys: Tensor | None
    causal: bool
    kernel: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Backward:
    """A backward begins; the gradients that follow are of what this says.

    Attributes:
        of: `loss`, the model's own, times the number of sequences; `projection`, the sum of the last stream states'
            entries, each times a standard normal number of its own.
        sequences: in the batch.
        stacks: names of the stacks whose last state is projected.
    """

    of: Literal["loss", "projection"]
    sequences: int
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class GradientState:
    """The gradient that one backward brings to a state of the stream, or to a tensor of an attention call.

    Attributes:
        stack: as in `StreamState`.
        layer: of the state, or of the block call that attends.
        part: `out` or `mid` of the stream; `self`, `cross`, `self.1`, … of an attention call.
        path: name of the module it belongs to.
        which: `state`, or which tensor of the call: `q`, `k`, `v`, `output`. They are what the kernel was given and
            gave, before key-value heads are repeated; where the model makes the map itself, the factors of the product
            that made the logits (scaled or not as they entered it), and of the one with the values.
        value: (sequences, tokens, width) for a state, (sequences, heads, tokens, width) for the others, detached, not
            to be changed; None where it cannot be seen.
        real: (sequences, tokens) bool; None when all are real tokens.
        backward: 0 in the first backward through this forward, 1 in the second, …
        reason: why there is no value.
    """

    stack: str
    layer: int
    part: str
    path: str
    which: Literal["state", "q", "k", "v", "output"]
    value: Tensor | None
    real: Tensor | None = None
    backward: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ParameterGradient:
    """The gradient that one backward brings to a parameter.

    Attributes:
        name: of the parameter, its first one where it is tied.
        weight: the parameter itself, detached.
        value: of the same shape, not to be changed; None where there is none.
        sequences: in the batch: the gradient is of a sum over them.
        backward: as in `GradientState`.
        reason: why there is no value.
    """

    name: str
    weight: Tensor
    value: Tensor | None
    sequences: int
    backward: int = 0
    reason: str = ""


Event = StreamState | AttentionCall | Backward | GradientState | ParameterGradient


class Observer(Protocol):
    """Reduces events on the spot and yields rows at the end.

    An observer keeps sufficient statistics, never the events' tensors. It is called with gradients off and with torch
    function modes off, must not draw from the global random state, and must not change what it sees.
    """

    needs: frozenset[Signal]

    def see(self, event: Event) -> None:
        """Take in one event of a signal in `needs`."""

    def rows(self) -> Sequence[Row]:
        """The numbers so far."""

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same kind saw (another batch, another process)."""
