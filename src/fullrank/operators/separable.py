"""Products through torch's fused attention, for scores that are products of queries and keys and nothing else.

A bias that depends on the key alone is one more coordinate: q·k + b_s = (q, 1)·(k, b_s). So hidden keys are b = −10⁹,
and the transposed product, softmax over queries of kᵀq − lse, is attention from keys to queries with b_t = −lse_t.
Neither needs a mask in memory, and both keep the causal flag.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.operators.blocks import BLOCK
from fullrank.operators.masks import Both, Causal, Full, Mask, Padding
from fullrank.operators.masks.base import restrict
from fullrank.operators.scores import Scores

__all__ = ["Separable"]

_HIDDEN = -1e9
_WIDEST = 128
"""Queries and keys narrower than V are padded up to this width, beyond which V is cut into pieces."""


@dataclass(frozen=True)
class Separable:
    """Scores whose mask is full or causal, with or without padding, and that have no bias, soft-cap or sink."""

    scores: Scores
    causal: bool

    @classmethod
    def of(cls, scores: Scores) -> "Separable | None":
        """The scores, if they are of this kind."""
        if scores.bias is not None or scores.softcap is not None or scores.sink is not None:
            return None
        parts: tuple[Mask, ...] = scores.mask.parts if isinstance(scores.mask, Both) else (scores.mask,)
        if not all(isinstance(part, Full | Padding) or part == Causal() for part in parts):
            return None
        return cls(scores, any(isinstance(part, Causal) for part in parts))

    @property
    def square(self) -> bool:
        """Whether the transposed map is of this kind too: causal maps can be turned round where they are square."""
        return not self.causal or self.scores.shape[2] == self.scores.shape[3]

    def width(self, columns: int) -> int:
        """How wide a call for so many columns is: the kernel wants q, k and V equally wide."""
        return max(self.scores.query.shape[3], min(columns, _WIDEST))

    def apply(self, V: Tensor, out: Tensor) -> None:
        """A V into `out`."""
        real = self.scores.mask.keys(self.scores.shape, self.scores.device)
        bias = None if real is None else torch.where(real, 0.0, _HIDDEN).to(V.dtype)
        if V.shape[1] not in (out.shape[1], self.scores.key.shape[1]):
            V = V.repeat_interleave(out.shape[1] // V.shape[1], 1)
        for batch, heads, keys in self._pieces(V.shape[3]):
            q, k = self.scores.query[batch, heads].to(V.dtype), self.scores.key[batch, keys].to(V.dtype)
            v = V[batch, heads if V.shape[1] == out.shape[1] else keys]
            out[batch, heads] = self._call(q, k, v, None if bias is None else restrict(bias, batch, heads))
        if real is not None:
            seen = self.scores.mask.visible_count(self.scores.shape, self.scores.device) > 0
            out *= seen[..., None]

    def apply_transposed(self, U: Tensor, out: Tensor, log_sum_exp: Tensor, column_sum: Tensor) -> None:
        """Aᵀ U into `out`. Rows that see no key (log-sum-exp NaN) take no part."""
        bias = torch.where(log_sum_exp.isnan(), _HIDDEN, -log_sum_exp).to(U.dtype)
        for batch, heads, keys in self._pieces(U.shape[3]):
            q, k = self.scores.query[batch, heads].to(U.dtype), self.scores.key[batch, keys].to(U.dtype)
            u, b = U[batch, heads], bias[batch, heads]
            if self.causal:  # key s is read by the queries t ≥ s: causal from the other end
                q, k, u, b = (x.flip(2) for x in (q, k, u, b))
            found = self._call(k, q, u, b)
            out[batch, heads] = found.flip(2) if self.causal else found
        c = column_sum[..., None].to(U.dtype)
        out.copy_(torch.where(c > 0, out * c, 0))

    def _pieces(self, columns: int) -> Iterator[tuple[slice, slice, slice]]:
        """Sequences, heads and key heads of a call, one head of each group at a time so that no key is repeated."""
        batch, _, queries, keys = self.scores.shape
        group, key_heads = self.scores.group, self.scores.key.shape[1]
        size = max(1, 2 * BLOCK // max(1, max(queries, keys) * self.width(columns)))
        sequences, some = max(1, size // key_heads), min(size, key_heads)
        for b in range(0, batch, sequences):
            for h in range(0, key_heads, some):
                stop = min(h + some, key_heads)
                for member in range(group):
                    heads = slice(h * group + member, stop * group, group)
                    yield slice(b, min(b + sequences, batch)), heads, slice(h, stop)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax(scale · q·k + bias of the key) v."""
        columns, scale = v.shape[3], self.scores.factor
        if bias is not None:
            q = torch.cat([q * scale, torch.ones_like(q[..., :1])], -1)
            k = torch.cat([k, bias[..., None].expand(*k.shape[:3], 1)], -1)
            scale = 1.0
        width = max(q.shape[3], min(columns, _WIDEST))
        if q.device.type != "cpu":
            width = -(-width // 8) * 8  # what the kernels of a GPU take without falling back
        q, k = (functional.pad(x, (0, width - x.shape[3])) for x in (q, k))
        out = []
        for start in range(0, columns, width):
            piece = v[..., start : start + width]
            padded = functional.pad(piece, (0, width - piece.shape[3]))
            found = functional.scaled_dot_product_attention(q, k, padded, is_causal=self.causal, scale=scale)
            out.append(found[..., : piece.shape[3]])
        return out[0] if len(out) == 1 else torch.cat(out, -1)
