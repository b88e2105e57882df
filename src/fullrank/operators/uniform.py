"""U, attention that does not select, and differences of maps."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.operators.blocks import BLOCK, Tile, tiles
from fullrank.operators.masks import Mask, Shape
from fullrank.operators.masks.base import restrict
from fullrank.operators.products import columns_of

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
        values = columns_of(self.shape, V, "V", self.dtype)
        group = self.shape[1] // values.shape[1]
        out = values.new_empty(*self.shape[:3], values.shape[3])
        for tile in self._pieces(values.shape[3]):
            at, shape = tile[:2], self._shape_of(tile)
            v = (
                values[tile.batch, tile.heads]
                if group == 1
                else values[tile.batch].repeat_interleave(group, 1)[:, tile.heads]
            )
            sums = over_visible(self.mask.select(*at), shape, v.mT)
            out[at] = (sums.mT * restrict(self._weight, *at)[..., None]).to(self.dtype)
        return out if V.ndim == 4 else out[0]

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Uᵀ u. Cost: O(T) for all masks but arbitrary ones."""
        left = columns_of(self.shape, U, "U", self.dtype)
        if left.shape[1] != self.shape[1]:
            left = left.repeat_interleave(self.shape[1] // left.shape[1], 1)
        out = left.new_empty(*self.shape[:2], self.shape[3], left.shape[3])
        for tile in self._pieces(left.shape[3]):
            at = tile[:2]
            u = left[at].double() * restrict(self._weight, *at)[..., None]
            out[at] = spread_visible(self.mask.select(*at), self._shape_of(tile), u).to(self.dtype)
        return out if U.ndim == 4 else out[0]

    def _pieces(self, columns: int) -> Iterator[Tile]:
        """Some sequences and heads at a time, so that running sums in float64 stay small."""
        return tiles((*self.shape[:2], columns, max(self.shape[2:])))

    def _shape_of(self, tile: Tile) -> Shape:
        return (tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, *self.shape[2:])

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
    batch, heads, queries, _ = shape
    values = values.double()
    if not mask.plain:
        parts = [values @ visible.to(values.dtype).mT for _, visible in _visible_rows(mask, shape, values.device)]
        return torch.cat(parts, -1)
    real = mask.keys(shape, values.device)
    if real is not None:
        values = values * real[:, :, None]
    before = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    bounds = mask.intervals(shape, values.device)
    first, stop = (x[:, None, None].expand(batch, heads, values.shape[2], queries) for x in bounds)
    return before.gather(-1, stop) - before.gather(-1, first)


def spread_visible(mask: Mask, shape: Shape, u: Tensor) -> Tensor:
    """The transpose of `over_visible`: what each key gets when every query hands its row of u to all keys it sees.

    Args:
        mask: who is visible.
        shape: (batch, heads, queries, keys).
        u: (batch, heads, queries, columns), float64.

    Returns:
        (batch, heads, keys, columns).
    """
    batch, heads, _, keys = shape
    if not mask.plain:
        out = u.new_zeros(batch, heads, keys, u.shape[3])
        for rows, visible in _visible_rows(mask, shape, u.device):
            out += visible.to(u.dtype).mT @ u[:, :, rows]
        return out
    # u_t is added where its interval starts and taken away where it stops: a running sum spreads it out
    first, stop = (x[:, None, :, None].expand(u.shape) for x in mask.intervals(shape, u.device))
    change = u.new_zeros(batch, heads, keys + 1, u.shape[3])
    change.scatter_add_(2, first, u).scatter_add_(2, stop, -u)
    out = change.cumsum(2)[:, :, :keys]
    real = mask.keys(shape, u.device)
    return out if real is None else out * real[..., None]


def _visible_rows(mask: Mask, shape: Shape, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    batch, heads, queries, keys = shape
    step = max(1, BLOCK // max(1, 2 * batch * heads * keys))
    for t in range(0, queries, step):
        rows = slice(t, min(t + step, queries))
        visible = mask.block(rows, slice(0, keys), shape, device=device)
        assert visible is not None  # a mask with a pattern always has a block
        yield rows, visible.expand(*visible.shape[:2], rows.stop - rows.start, keys)


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
