"""What is softmaxed: scaled products of queries and keys, a bias, a soft-cap, a mask and a sink."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.masks import Full, Mask, Shape

__all__ = ["Bias", "Scores", "accumulate"]

Bias = Tensor | Callable[[slice, slice], Tensor]
"""Added to the scores: broadcastable to (batch, heads, queries, keys), or that for a range of queries and of keys."""


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the precision that sums are taken in: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


@dataclass(frozen=True, eq=False)
class Scores:
    """s_ts = softcap(scale · q_t·k_s) + bias_ts for visible pairs, and a sink logit beside each row.

    Query head h reads key head h // (heads / key heads); keys are never expanded. What is half precision is brought to
    float32 before the product (rounding the scores instead would cost hundredths of a nat).

    Attributes:
        query: (batch, heads, queries, width), or three dimensions for one sequence.
        key: (batch, key heads, keys, width); the number of heads is a multiple of the number of key heads.
        scale: factor of the product; 1/√width by default.
        mask: who is visible.
        bias: added after the soft-cap: a tensor, or a function of two slices.
        softcap: c makes c·tanh(s/c) of the scaled product.
        sink: one logit per head that joins the softmax's denominator and no row of A, (heads,).
    """

    query: Float[Tensor, "..."]
    key: Float[Tensor, "..."]
    scale: float | None = None
    mask: Mask = Full()  # noqa: RUF009 - frozen
    bias: Any = None
    softcap: float | None = None
    sink: Float[Tensor, " heads"] | None = None

    def __post_init__(self) -> None:
        q, k = (x[None] if x.ndim == 3 else x for x in (self.query, self.key))
        if q.ndim != 4 or k.ndim != 4:
            raise ShapeError(
                f"query {tuple(q.shape)} and key {tuple(k.shape)}; expected (batch, heads, tokens, width) of both."
            )
        if q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[0] not in (1, q.shape[0]):
            raise ShapeError(
                f"query {tuple(q.shape)} and key {tuple(k.shape)} do not fit: batch and width must agree, and the "
                "heads of the query be a multiple of the key's."
            )
        if self.sink is not None and self.sink.shape != q.shape[1:2]:
            raise ShapeError(f"sink has the shape {tuple(self.sink.shape)}; expected one logit for {q.shape[1]} heads.")
        set_ = object.__setattr__
        set_(self, "query", q)
        set_(self, "key", k.expand(q.shape[0], -1, -1, -1))
        set_(self, "scale", 1 / math.sqrt(q.shape[3]) if self.scale is None else float(self.scale))

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: float32, or float64 for float64 queries."""
        return accumulate(self.query[:0]).dtype

    @property
    def device(self) -> torch.device:
        """Where the query is."""
        return self.query.device

    @property
    def factor(self) -> float:
        """`scale`, known to be a number."""
        assert self.scale is not None
        return self.scale

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def select(self, batch: slice, heads: slice) -> "Scores":
        """The scores of some sequences and heads, without copying where the heads respect the key groups."""
        batch_start, batch_stop, _ = batch.indices(self.shape[0])
        start, stop, _ = heads.indices(self.shape[1])
        batch, heads, group = slice(batch_start, batch_stop), slice(start, stop), self.group
        inside = start // group == (stop - 1) // group
        if inside or (start % group == 0 and stop % group == 0):
            key = self.key[batch, start // group : (stop - 1) // group + 1]
        else:
            index = torch.arange(start, stop, device=self.device) // group
            key = self.key[batch].index_select(1, index)
        return replace(
            self,
            query=self.query[batch, heads],
            key=key,
            mask=self.mask.select(batch, heads),
            bias=_select_bias(self.bias, batch, heads),
            sink=None if self.sink is None else self.sink[heads],
        )

    def leading(self, tokens: int) -> "Scores":
        """The scores among the first tokens, as queries and as keys, without copying."""
        bias = self.bias
        if isinstance(bias, Tensor):
            bias = bias[(None,) * (4 - bias.ndim)][:, :, :tokens, :tokens]
        query, key = self.query[:, :, :tokens], self.key[:, :, :tokens]
        return replace(self, query=query, key=key, mask=self.mask.leading(tokens), bias=bias)

    def bias_block(self, queries: slice, keys: slice) -> Float[Tensor, "#batch #heads #q #k"] | None:
        """The additive bias of one block, in the scores' precision; None where there is none."""
        if self.bias is None:
            return None
        if callable(self.bias):
            block = self.bias(queries, keys)
            block = block[(None,) * (4 - block.ndim)]
        else:
            bias = self.bias[(None,) * (4 - self.bias.ndim)]
            block = bias[
                :,
                :,
                queries if bias.shape[2] != 1 else slice(0, 1),
                keys if bias.shape[3] != 1 else slice(0, 1),
            ]
        found: Tensor = block.to(device=self.device, dtype=self.dtype)
        return found

    def visible(self, queries: slice, keys: slice) -> Bool[Tensor, "#batch #heads #q #k"] | None:
        """The mask of one block; None when all of it is visible."""
        return self.mask.block(queries, keys, self.shape, device=self.device)

    def block(self, queries: slice, keys: slice) -> Float[Tensor, "batch heads q k"]:
        """The scores of a range of queries and keys, −∞ where hidden, without the sink."""
        batch, heads = self.shape[:2]
        q = self.query[:, :, queries].to(self.dtype) * self.factor
        k = self.key[:, :, keys].to(self.dtype)
        # query heads of one group stand below one another, so that keys need no expansion
        q = q.reshape(batch, heads // self.group, self.group * q.shape[2], q.shape[3])
        s = (q @ k.mT).view(batch, heads, -1, k.shape[2])
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_().mul_(self.softcap)
        bias = self.bias_block(queries, keys)
        if bias is not None:
            s = s + bias
        visible = self.visible(queries, keys)
        return s if visible is None else s.masked_fill(~visible, -torch.inf)


def _select_bias(bias: Any, batch: slice, heads: slice) -> Any:
    if bias is None:
        return None
    if callable(bias):
        return lambda queries, keys: _select_bias(bias(queries, keys), batch, heads)
    bias = bias[(None,) * (4 - bias.ndim)]
    bias = bias[batch] if bias.shape[0] != 1 else bias
    return bias[:, heads] if bias.shape[1] != 1 else bias
