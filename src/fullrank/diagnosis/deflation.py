"""Attention without its leading singular direction: A − s₁u₁v₁ᵀ, head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fullrank.edit import Call
from fullrank.errors import EditError
from fullrank.operators.orthonormal import orthonormalise
from fullrank.operators.randomness import own_generator

__all__ = ["deflated", "leading_triplet"]

_MEMORY = 256 << 20
"""Bytes of maps in memory at a time; at least one head of one sequence."""

_FACTORISED = 64
"""Maps with no more queries or keys than this are factorised."""

_WIDTH = 8
_STEPS = 32
_RESIDUAL = 1e-4
_AGREES = 2e-2
"""Relative difference between AV as it was made and as it was computed again, beyond which the map is another."""


def leading_triplet(A: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """s₁, u₁ and v₁ of every matrix of a batch.

    Small matrices are factorised. Others go through subspace iteration on AᵀA with eight vectors, the first of them
    ones, until ‖Aᵀu − sv‖ ≤ 10⁻⁴ s, 32 times at most: where s₁ and s₂ are close (a head that points) what comes out is
    a direction between theirs, and s its gain. Cost per map: up to 64 products with eight vectors.

    Args:
        A: (…, queries, keys), float32 or float64.
        seed: of the starting vectors.

    Returns:
        (…,), (…, queries) and (…, keys).
    """
    if min(A.shape[-2:]) <= _FACTORISED:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return S[..., 0], U[..., 0], Vh[..., 0, :]
    drawn = torch.randn(A.shape[-1], _WIDTH - 1, generator=own_generator(seed), dtype=A.dtype).to(A.device)
    start = torch.cat([torch.ones_like(drawn[:, :1]), drawn], -1)
    V = orthonormalise(start.expand(*A.shape[:-2], -1, -1))
    for _ in range(_STEPS):
        Y = A @ V
        rotation = torch.linalg.eigh((Y.mT @ Y).double()).eigenvectors[..., -1:].to(A.dtype)
        image = Y @ rotation
        s = image.norm(dim=-2, keepdim=True)
        u, v = image / s.clamp(min=torch.finfo(A.dtype).tiny), V @ rotation
        W = A.mT @ Y
        back = (W @ rotation) / s.clamp(min=torch.finfo(A.dtype).tiny)  # Aᵀu
        if bool(((back - s * v).norm(dim=-2) <= _RESIDUAL * s[..., 0]).all()):
            break
        V = orthonormalise(W)
    return s[..., 0, 0], u[..., 0], v[..., 0]


def deflated(
    call: Call,
    output: Tensor,
    real: tuple[Tensor | None, Tensor | None],
    *,
    heads: Sequence[int] = (),
    seed: int = 0,
) -> Tensor:
    """What heads put out without the leading triplet of their map over real tokens: AV − s₁u₁(v₁ᵀV).

    Of a mask that hides keys from some queries only (causal, windows) the triplet is that of the whole masked map, and
    a query takes s₁u₁v₁ᵀ off the keys that it sees: it is told nothing of others. The map is made once more, from the
    call's queries, keys and mask where it was not made by the model, some heads at a time.

    Args:
        call: as it was made.
        output: AV, (batch, heads, queries, width).
        real: (batch, queries) and (batch, keys), which are real; None for all.
        heads: only these; all by default.
        seed: of the starting vectors.

    Returns:
        A tensor like `output`; rows of padded queries, and of queries that see nothing, stay as they are.

    Raises:
        EditError: where the mask is code, or the map that the call shows is not the one that made its output.
    """
    visible = call.visible()
    groups = output.shape[1] // call.value.shape[1]
    new = output.clone()
    chosen = list(heads) or list(range(output.shape[1]))
    for b, some in _parts(output.shape[0], chosen, call.queries * call.keys):
        seen = None if visible is None else _of(visible, b, some)
        A = _map(call, seen, b, some)
        V = call.value[b, [head // groups for head in some]].to(A.dtype)
        made = output[b, some].to(A.dtype)
        asked = torch.ones(1, call.queries, 1, dtype=torch.bool, device=A.device)
        if real[0] is not None:
            asked = asked & real[0][b, :, None]
        if seen is not None:
            asked = asked & seen.any(-1, keepdim=True)
        kept = torch.where(asked, made, 0)
        if bool((kept - torch.where(asked, A @ V, 0)).norm() > _AGREES * kept.norm()):
            raise EditError(
                f"the map of {call.place.path} cannot be deflated: it is not what its queries, keys and mask give "
                "(a learned sink, a soft-cap or another term of the kernel takes part)."
            )
        inside = asked if real[1] is None else asked & real[1][b]
        s, u, v = leading_triplet(torch.where(inside, A, 0), seed=seed)
        rank_one = s[:, None, None] * u[..., None] * v[:, None]
        less = rank_one @ V if seen is None else torch.where(seen, rank_one, 0) @ V
        new[b, some] = torch.where(asked, made - less, made).to(output.dtype)
    return new


def _parts(batch: int, heads: Sequence[int], entries: int) -> Iterator[tuple[int, list[int]]]:
    """Sequences one by one, with as many heads as fit the memory; three maps are held at a time."""
    together = max(1, _MEMORY // (3 * 4 * entries))
    for b in range(batch):
        for first in range(0, len(heads), together):
            yield b, list(heads[first : first + together])


def _of(tensor: Tensor, b: int, heads: list[int]) -> Tensor:
    """A tensor that broadcasts over sequences and heads, of one sequence and some heads."""
    part = tensor[b if tensor.shape[0] > 1 else 0]
    return part[heads] if part.shape[0] > 1 else part


def _map(call: Call, seen: Tensor | None, b: int, heads: list[int]) -> Tensor:
    """The map of one sequence and some heads, at least in float32; rows that see nothing are zero."""
    if call.weights is not None:
        A = call.weights[b, heads]
        return A if A.dtype == torch.float64 else A.float()
    assert call.query is not None
    assert call.key is not None
    groups = call.query.shape[1] // call.key.shape[1]
    Q, K = call.query[b, heads], call.key[b, [head // groups for head in heads]]
    Q, K = (x if x.dtype == torch.float64 else x.float() for x in (Q, K))
    s = Q @ K.mT * (Q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    for added in (call.mask, call.bias):
        if added is not None and added.dtype != torch.bool:
            s = s + _of(added[(None,) * (4 - added.ndim)], b, heads).to(s.dtype)
    if seen is None:
        return s.softmax(-1)
    return torch.where(seen, s.masked_fill(~seen, -torch.inf).softmax(-1), 0)
