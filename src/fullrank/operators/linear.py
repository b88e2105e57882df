"""Linear maps known by their products: what the spectral methods ask of a map, and how maps are put together.

Every operator is a batch of (m × n) matrices, `shape = (*lead, m, n)`; `matmat` takes (*lead, n, columns) to
(*lead, m, columns), `rmatmat` the other way. Combinations cost what their parts cost, plus O(m + n) per column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Centred", "LinearOperator", "Matrix", "MatrixFree", "Restricted"]


@runtime_checkable
class LinearOperator(Protocol):
    """A batch of matrices that can be multiplied from both sides; attention maps are such operators."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(*lead, m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in: float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Where products are computed."""

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """M V, for V of (*lead, n, columns)."""

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Mᵀ U, for U of (*lead, m, columns)."""


@dataclass(frozen=True, eq=False)
class MatrixFree:
    """Any linear map, from its shape and its two products.

    Attributes:
        shape: (*lead, m, n).
        matmat: V ↦ M V.
        rmatmat: U ↦ Mᵀ U.
        dtype: of the vectors that the products take.
        device: of these vectors.
    """

    shape: tuple[int, ...]
    matmat: Callable[[Tensor], Tensor]
    rmatmat: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable


@dataclass(frozen=True, eq=False)
class Matrix:
    """A batch of matrices that exist, (*lead, m, n); half precision is brought to float32."""

    entries: Float[Tensor, "*lead m n"]

    def __post_init__(self) -> None:
        if self.entries.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "entries", self.entries.float())

    @property
    def shape(self) -> tuple[int, ...]:
        """(*lead, m, n)."""
        return tuple(self.entries.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        """Of the entries."""
        return self.entries.device

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """M V."""
        return self.entries @ V

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Mᵀ U."""
        return self.entries.mT @ U


class _Like:
    """What a combination takes over from its first part."""

    operator: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        """(*lead, m, n)."""
        return tuple(self.operator.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.operator.device


@dataclass(frozen=True, eq=False)
class Restricted(_Like):
    """M with rows or columns that are out set to zero: the non-zero singular values are those of the submatrix.

    Attributes:
        operator: M.
        rows: which rows stay, broadcastable to (*lead, m); None for all.
        columns: which columns stay, broadcastable to (*lead, n); None for all.
    """

    operator: LinearOperator
    rows: Bool[Tensor, "..."] | None = None
    columns: Bool[Tensor, "..."] | None = None

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """R M C V, with R and C the projections on the rows and columns that stay."""
        return _keep(self.operator.matmat(_keep(V, self.columns)), self.rows)

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(R M C)ᵀ U."""
        return _keep(self.operator.rmatmat(_keep(U, self.rows)), self.columns)


@dataclass(frozen=True, eq=False)
class Centred(_Like):
    """(I − J) M with J = 1_R 1_Rᵀ / #R the mean over the rows R; M must be zero outside R.

    ‖(I − J) M‖₂ is the largest factor by which differences between the outputs of M can come out.

    Attributes:
        operator: M.
        rows: the rows R, broadcastable to (*lead, m); None for all.
    """

    operator: LinearOperator
    rows: Bool[Tensor, "..."] | None = None

    def matmat(self, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(I − J) M V."""
        return self._centre(self.operator.matmat(V))

    def rmatmat(self, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Mᵀ (I − J) U."""
        return self.operator.rmatmat(self._centre(_keep(U, self.rows)))

    def _centre(self, W: Tensor) -> Tensor:
        if self.rows is None:
            return W - W.mean(-2, keepdim=True)
        count = self.rows.sum(-1)[..., None, None].clamp(min=1)
        return _keep(W - W.sum(-2, keepdim=True) / count, self.rows)


def _keep(W: Tensor, which: Tensor | None) -> Tensor:
    return W if which is None else torch.where(which[..., None], W, 0)
