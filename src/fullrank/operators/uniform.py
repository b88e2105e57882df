"""U, attention that does not select, and differences of maps."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.operators.masks import Mask, Shape

__all__ = ["Difference", "Uniform", "over_visible", "visible_mass"]


class Uniform:
    """U_ts = r_t / n_t for the n_t keys that query t sees, else 0.

    r_t is 1, or the sum of the row of A where a learned sink takes a part of it. For full attention U is the mean over
    tokens J, for causal attention the running mean.
    """

    def __init__(self, mask: Mask, shape: Shape, *, dtype: torch.dtype, device: torch.device, row_sum: Tensor | None):
        self.mask, self.shape, self.dtype, self.device, self.row_sum = mask, shape, dtype, device, row_sum
        count = mask.visible_count(shape, device)
        self._weight = torch.where(count > 0, 1 / count.double(), 0)  # (batch|1, heads|1, queries)
        if row_sum is not None:
            self._weight = torch.where(count > 0, self._weight * row_sum, 0)

    def select(self, batch: slice, heads: slice) -> "Uniform":
        """U of some sequences and heads."""
        start, stop, _ = batch.indices(self.shape[0])
        first, last, _ = heads.indices(self.shape[1])
        return Uniform(
            self.mask.select(batch, heads),
            (stop - start, last - first, *self.shape[2:]),
            dtype=self.dtype,
            device=self.device,
            row_sum=None if self.row_sum is None else self.row_sum[batch, heads],
        )

    def rows(self, queries: slice) -> Float[Tensor, "batch heads q keys"]:
        """A range of rows of U, materialised."""
        weight = self._weight[..., queries, None].to(self.dtype)
        visible = self.mask.block(queries, slice(0, self.shape[3]), self.shape, device=self.device)
        block = weight if visible is None else weight * visible
        return block.expand(*self.shape[:2], queries.stop - queries.start, self.shape[3])

    def dense(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of U."""
        return self.rows(slice(0, self.shape[2]))

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """U V: means of the values that each query sees. Cost: O(T) for all masks but arbitrary ones."""
        V4 = (V[None] if V.ndim == 3 else V).to(self.dtype)
        if V4.shape[1] != self.shape[1]:
            V4 = V4.repeat_interleave(self.shape[1] // V4.shape[1], 1)
        sums = over_visible(self.mask, self.shape, V4.mT).mT
        return (sums * self._weight[..., None]).to(self.dtype).view(*V.shape[:-3], self.shape[1], -1, V.shape[-1])

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Uᵀ u. Cost: O(T) for all masks but arbitrary ones."""
        batch, heads, queries, keys = self.shape
        u = (U[None] if U.ndim == 3 else U).double() * self._weight[..., None]
        if not self.mask.plain:
            out = u.new_zeros(batch, heads, keys, u.shape[3])
            rows = max(1, (1 << 20) // max(1, batch * heads * keys))
            for t in range(0, queries, rows):
                block = slice(t, min(t + rows, queries))
                visible = self.mask.block(block, slice(0, keys), self.shape, device=self.device)
                assert visible is not None
                out += visible.expand(*visible.shape[:3], keys).to(u.dtype).mT @ u[:, :, block]
        else:
            # u_t is added where its interval starts and taken away where it stops: a running sum spreads it out
            first, stop = (x[:, None, :, None].expand(u.shape) for x in self.mask.intervals(self.shape, self.device))
            change = u.new_zeros(batch, heads, keys + 1, u.shape[3])
            change.scatter_add_(2, first, u).scatter_add_(2, stop, -u)
            out = change.cumsum(2)[:, :, :keys]
            real = self.mask.keys(self.shape, self.device)
            if real is not None:
                out = out * real[..., None]
        return out.to(self.dtype).view(*U.shape[:-2], keys, U.shape[-1])

    def __sub__(self, other: Any) -> "Difference":
        return Difference(self, other)


class Difference:
    """L − R of two maps of one shape, as an operator."""

    def __init__(self, left: Any, right: Any):
        self.left, self.right = left, right

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return self.left.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return self.left.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self.left.device  # type: ignore[no-any-return]

    def select(self, batch: slice, heads: slice) -> "Difference":
        """The difference for some sequences and heads."""
        return Difference(self.left.select(batch, heads), self.right.select(batch, heads))

    def rows(self, queries: slice) -> Float[Tensor, "batch heads q keys"]:
        """A range of rows, materialised."""
        return self.left.rows(queries) - self.right.rows(queries)  # type: ignore[no-any-return]

    def dense(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of it."""
        return self.left.dense() - self.right.dense()  # type: ignore[no-any-return]

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """L V − R V."""
        return self.left.matmat(V) - self.right.matmat(V)  # type: ignore[no-any-return]

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Lᵀ u − Rᵀ u."""
        return self.left.rmatmat(U) - self.right.rmatmat(U)  # type: ignore[no-any-return]


def over_visible(mask: Mask, shape: Shape, values: Tensor) -> Tensor:
    """Σ of values over the keys that each query sees, in float64.

    Args:
        mask: who is visible.
        shape: (batch, heads, queries, keys).
        values: (batch, heads, columns, keys).

    Returns:
        (batch, heads, columns, queries). Running sums where the mask is plain, else products by blocks.
    """
    batch, heads, queries, keys = shape
    values = values.double()
    if not mask.plain:
        sums = []
        rows = max(1, (1 << 20) // max(1, batch * heads * keys))
        for t in range(0, queries, rows):
            block: Bool[Tensor, ...] | None
            block = mask.block(slice(t, min(t + rows, queries)), slice(0, keys), shape, device=values.device)
            assert block is not None
            sums.append(values @ block.expand(*block.shape[:3], keys).to(values.dtype).mT)
        return torch.cat(sums, -1)
    real = mask.keys(shape, values.device)
    if real is not None:
        values = values * real[:, :, None]
    before = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    first, stop = (
        x[:, None, None].expand(batch, heads, values.shape[2], queries) for x in mask.intervals(shape, values.device)
    )
    return before.gather(-1, stop) - before.gather(-1, first)


def visible_mass(mask: Mask, shape: Shape, c: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead queries"]:
    """Σ of c over the keys that each query sees: m_t = Σ_{s visible to t} c_s.

    Args:
        mask: who is visible.
        shape: (batch, heads, queries, keys).
        c: (…, batch, heads, keys), such as column means of several groups of rows.

    Returns:
        (…, batch, heads, queries), in c's precision.
    """
    flat = c.reshape(-1, *c.shape[-3:]).movedim(0, 2)  # (batch, heads, groups, keys)
    sums = over_visible(mask, shape, flat).movedim(2, 0)
    return sums.reshape(*c.shape[:-1], shape[2]).to(c.dtype)
