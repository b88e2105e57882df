"""The leading singular values of any linear operator, by block Golub–Kahan bidiagonalisation.

From a left block U₀ the method takes half steps: V₀ = orth(AᵀU₀), U₁ = orth(AV₀), V₁ = orth(AᵀU₁), … with full
reorthogonalisation. A wide start is cut to its leading Ritz vectors after one step each way. After each half step the
singular values of A restricted to the basis so far (of Aᵀ U₀…Uᵢ or of A V₀…Vᵢ) are lower bounds that only grow; the
method stops when they do not. A small residual alone says that *a* singular value lies near, not which one: with
values clustered near 1, as in trained heads, growth tells more.

Small problems are solved in float64. Their Gram matrix resolves a value to about 1e-8 of the largest in float64 and to
the products' own rounding, about 1e-7 of the largest, in float32.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.linear import LinearOperator
from fullrank.operators.orthonormal import gram, orthonormalise
from fullrank.operators.randomness import own_generator

__all__ = ["Spectrum", "leading_singular_values"]

_SPARE = 8
"""Columns beyond the values asked for that a start has at least."""

_THIN = 32
"""Columns to go on with where a wider start has not settled the values."""

_NARROW = 16
"""Columns below which a product gets no cheaper."""


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values, with the evidence for them.

    Attributes:
        singular_values: in falling order; NaN where the operator is not finite.
        residuals: ‖Aᵀu − σv‖ of each triplet, u = Av/σ: some singular value lies within this distance.
        iterations: half steps taken (products with blocks of vectors); 0 where the matrix was factorised instead.
        exact: whether the values stopped growing before the cap (or were factorised), map by map.
    """

    singular_values: Float[Tensor, "*lead k"]
    residuals: Float[Tensor, "*lead k"]
    iterations: int
    exact: Bool[Tensor, "*lead"]


def leading_singular_values(
    operator: LinearOperator,
    k: int = 2,
    *,
    start: Float[Tensor, "*lead m block"] | None = None,
    tolerance: float = 5e-3,
    max_iterations: int = 24,
    seed: int = 0,
) -> Spectrum:
    """The k largest singular values of every matrix of a batch, from products alone.

    Never stores a matrix; cost: up to `max_iterations` products with blocks as wide as `start`, and O((m + n) · width²)
    per product for orthogonalisation. Matrices not much larger than the block are formed and factorised.

    Args:
        operator: anything with shape, dtype, device, matmat and rmatmat.
        k: how many values.
        start: left vectors near the leading singular space; the better, the fewer products. Random by default.
        tolerance: estimated relative growth still to come at which to stop.
        max_iterations: half steps (products) at most; reaching it sets `exact` to false.
        seed: of the random start.

    Returns:
        The values, in the operator's precision, and their evidence.

    Raises:
        ShapeError: k is not between 1 and the number of singular values.
    """
    *lead, m, n = operator.shape
    if not 1 <= k <= min(m, n):
        raise ShapeError(f"k={k} singular values of a {m} × {n} operator; expected 1 ≤ k ≤ {min(m, n)}.")
    width = max(16, 2 * k + 8) if start is None else start.shape[-1]
    if min(m, n) <= max(64, 2 * width):
        return _factorised(operator, k)
    if start is None:
        start = random_block((*lead, m, width), operator, seed)
    elif width < k + _SPARE:  # the first half step already has to give k values
        start = torch.cat([start, random_block((*lead, m, k + _SPARE - width), operator, seed)], -1)
    return _bidiagonalised(operator, k, start.to(operator.dtype), tolerance, max_iterations)


def random_block(shape: tuple[int, ...], operator: LinearOperator, seed: int) -> Tensor:
    """Gaussian vectors from a generator of one's own, the same on every device."""
    return torch.randn(shape, generator=own_generator(seed), dtype=operator.dtype).to(operator.device)


def _factorised(operator: LinearOperator, k: int) -> Spectrum:
    *lead, m, n = operator.shape
    side = min(m, n)
    eye = torch.eye(side, dtype=operator.dtype, device=operator.device).expand(*lead, side, side)
    matrix = (operator.matmat(eye) if n <= m else operator.rmatmat(eye)).double()
    finite = matrix.isfinite().all(-1).all(-1)
    sigma = torch.linalg.svdvals(torch.where(finite[..., None, None], matrix, 0))[..., :k]
    sigma = torch.where(finite[..., None], sigma, torch.nan).to(operator.dtype)
    return Spectrum(sigma, torch.zeros_like(sigma), 0, finite)


def _bidiagonalised(operator: LinearOperator, k: int, start: Tensor, tolerance: float, max_iterations: int) -> Spectrum:
    # X is the basis that was last multiplied, Z that of the other side, M the coefficients of the images of X in Z;
    # after each half step the two change roles
    products = itertools.cycle([operator.rmatmat, operator.matmat])
    X: list[Tensor] = [orthonormalise(start)]
    Z: list[Tensor] = []
    M = start.new_zeros((*start.shape[:-2], 0, start.shape[-1]), dtype=torch.float64)
    finite = torch.ones(start.shape[:-2], dtype=torch.bool, device=start.device)
    settled = torch.zeros_like(finite)
    history: list[Tensor] = []
    for iteration in itertools.count(1):
        Y = next(products)(X[-1])
        finite &= Y.sum((-2, -1)).isfinite()
        if not bool(finite.all()):  # such a map must not take the rest of the batch down with it
            Y = torch.where(finite[..., None, None], Y, 0)
        known = _coefficients(Z, Y)
        earlier = M[..., : M.shape[-1] - Y.shape[-1]]
        G = _image_gram(earlier, known, Y)
        sigma = torch.linalg.eigvalsh(G)[..., -k:].flip(-1).clamp(min=0).sqrt()
        history = [*history[-3:], sigma]
        # growth below a few units of the products' rounding counts as none
        settled = _settled(history, tolerance, 8 * torch.finfo(operator.dtype).eps)
        if iteration >= max_iterations or bool(settled.all()):
            break
        if iteration == 2 and start.shape[-1] > max(_THIN, k + _SPARE):
            # A wide start finds what it points at in one step each way. What is left needs degree more than width:
            # go on from the leading left Ritz vectors alone, whose values the next half step can only raise.
            leading = torch.linalg.eigh(G).eigenvectors[..., -max(_THIN, k + _SPARE) :]
            X, Z, M = [orthonormalise(Y @ leading.to(Y.dtype))], [], M[..., :0, : leading.shape[-1]]
            continue
        new = orthonormalise(Y, Z)
        zeros = M.new_zeros(*M.shape[:-2], new.shape[-1], earlier.shape[-1])
        below = torch.cat([zeros, _coefficients([new], Y)], -1)
        M = torch.cat([torch.cat([earlier, known], -1), below], -2).mT
        X, Z = [*Z, new], X
    # one more product for the evidence: x = X c is a singular vector of one side, y = op(x)/σ that of the other
    vectors = torch.linalg.eigh(G).eigenvectors[..., -k:].flip(-1)
    split = earlier.shape[-1]
    x = _combine(X, vectors)
    image = Y @ vectors[..., split:, :].to(Y.dtype)
    if Z:
        image = image + _combine(Z, earlier @ vectors[..., :split, :])
    scale = sigma[..., None, :].to(Y.dtype)
    y = torch.where(scale > 0, image / scale, 0)
    # padded, for matrix kernels take longer over two columns than over sixteen
    back = next(products)(torch.nn.functional.pad(y, (0, max(0, _NARROW - k))))[..., :k]
    residuals = (back - scale * x).norm(dim=-2)
    undefined = ~finite[..., None]
    sigma, residuals = sigma.to(Y.dtype).masked_fill(undefined, torch.nan), residuals.masked_fill(undefined, torch.nan)
    return Spectrum(sigma, residuals, iteration, settled & finite)


def _coefficients(basis: list[Tensor], Y: Tensor) -> Tensor:
    # of Y in an orthonormal basis given by blocks, in float64; orthogonal to all but the last block by construction
    if not basis:
        return Y.new_zeros((*Y.shape[:-2], 0, Y.shape[-1]), dtype=torch.float64)
    older = sum(B.shape[-1] for B in basis[:-1])
    return torch.nn.functional.pad((basis[-1].mT @ Y).double(), (0, 0, older, 0))


def _combine(basis: list[Tensor], coefficients: Tensor) -> Tensor:
    """Vectors from their coefficients in a basis given by blocks."""
    parts = coefficients.to(basis[0].dtype).split([B.shape[-1] for B in basis], -2)
    total: Tensor = basis[0] @ parts[0]
    for B, part in zip(basis[1:], parts[1:], strict=True):
        total = total + B @ part
    return total


def _image_gram(earlier: Tensor, known: Tensor, Y: Tensor) -> Tensor:
    """Gram matrix of [Z·earlier, Y], where Z is orthonormal and known = ZᵀY."""
    corner = earlier.mT @ known
    return torch.cat([torch.cat([earlier.mT @ earlier, corner], -1), torch.cat([corner.mT, gram(Y)], -1)], -2)


def _settled(history: list[Tensor], tolerance: float, floor: float) -> Tensor:
    # Where growth falls by a factor r per half step, what is still to come is about r/(1 − r) of the last growth: slow
    # convergence has to be more still than fast convergence. Left and right steps gain in turns, so r is taken over two
    # of them as soon as there are enough; before, 1/2 is taken for it.
    sigma = history[-1]
    if len(history) == 1:
        return torch.zeros(sigma.shape[:-1], dtype=torch.bool, device=sigma.device)
    growth = [(later - earlier).clamp(min=0) for earlier, later in itertools.pairwise(history)]
    to_come = growth[-1]
    if len(growth) > 1:
        ratio = growth[-1] / growth[0].clamp(min=1e-300)
        ratio = (ratio.sqrt() if len(growth) > 2 else ratio).clamp(max=0.9)
        to_come = to_come * (ratio / (1 - ratio)).clamp(min=1)
    still: Tensor = (to_come <= tolerance * sigma + floor * sigma[..., :1]).all(-1)
    return still
