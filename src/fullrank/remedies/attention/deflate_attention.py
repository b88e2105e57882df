"""Deflated attention: the map without its leading singular triplets, where several directions stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.errors import RemedyError
from fullrank.remedies.attention.dense_map import dense_map, refuse_other_maps
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["deflate_attention", "leading_left_vectors"]

_SMALL = 128
"""Tokens up to which the map is factorised."""

_SPARE = 8
"""Columns that the iteration carries beyond those that are asked for."""


@dataclass(frozen=True)
class Deflated:
    """O ← (I − λ U_k U_kᵀ) O.

    Attributes:
        k: how many triplets are removed.
        strength: λ.
        iterations: of the subspace.
    """

    k: int
    strength: float
    iterations: int

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width) without its part in the leading left singular vectors."""
        refuse_other_maps(call, "deflate-attention")
        with torch.autocast(output.device.type, enabled=False):
            return self._deflated(call, output)

    def _deflated(self, call: Call, output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        with torch.no_grad():
            A = dense_map(call)
            visible = call.visible()
            if visible is not None and call.queries == call.keys:  # rows of padding are no part of the map
                A = A * visible.any(-2)[..., :, None]
            value = call.value.to(wide)
            U = leading_left_vectors(
                A, self.k, self.iterations, value.repeat_interleave(A.shape[1] // value.shape[1], 1)
            )
        Y = output.to(wide)
        return output - (self.strength * (U @ (U.mT @ Y))).to(output.dtype)


def leading_left_vectors(A: Tensor, k: int, iterations: int, start: Tensor) -> Tensor:
    """U_k of A, (…, queries, k): by factorisation up to 128 tokens or for no iterations, else by subspace iteration.

    The iteration starts from A applied to a constant and to `start`, carries k + 8 columns, and ends with the exact
    singular vectors of A seen in its subspace.

    Args:
        A: (…, queries, keys).
        k: how many.
        iterations: products with AAᵀ.
        start: (…, keys, width), anything that differs between tokens, such as the values.

    Returns:
        Orthonormal columns; 0 where the singular value is 0.
    """
    if iterations == 0 or min(A.shape[-2:]) <= _SMALL:
        U, s, _ = torch.linalg.svd(A, full_matrices=False)
        U, s = U[..., :k], s[..., :k]
    else:
        columns = torch.cat([torch.ones_like(start[..., :1]), start[..., : k + _SPARE - 1]], -1)
        Q = torch.linalg.qr(A @ columns).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
        energy, vectors = torch.linalg.eigh((Q.mT @ A) @ (A.mT @ Q))
        U, s = Q @ vectors.flip(-1)[..., :k], energy.flip(-1)[..., :k].clamp(min=0).sqrt()
    kept: Tensor = U * (s > 1e-6 * s[..., :1])[..., None, :]
    return kept


@remedy(
    "deflate-attention",
    "attention without its k leading singular triplets",
    addresses=("rank-collapse-width", "rank-collapse-depth", "averaging-heads"),
    acts_on="attention",
    exactness="changes-function",
    formula="A ← A − λ Σ_{i≤k} s_i u_i v_iᵀ: O ← (I − λ U_k U_kᵀ) AV with the k leading left singular vectors of A",
    papers=(
        "Naderi, Nait Saada, Tanner: Mind the Gap: a Spectral Analysis of Rank Collapse and Signal Propagation in "
        "Attention Layers, ICML 2025, arXiv 2410.07799 (its fix removes one outlier, 11ᵀ/T; several are our extension)",
    ),
    keys=("mind_the_gap",),
    parameters=(
        Parameter("k", "how many triplets are removed", 1, kind="integer", low=1, high=64),
        Parameter("strength", "λ, how much of them", 1.0, above=0.0, high=1.0),
        Parameter(
            "iterations",
            "products with AAᵀ that find the vectors, beyond 128 tokens; 0 factorises the map at any length",
            4,
            kind="integer",
            low=0,
            high=100,
        ),
    ),
    limits=(
        "Not for causal attention: a singular vector knows all tokens, and every query would see later ones. Causal "
        "calls are left alone, and a model that has no others is refused; use center-attention there.",
        "Refused where a kernel has sinks, and beside remedies that compute attention themselves (softcap, softpick, "
        "learned-sink) where the model shows queries and keys.",
        "The singular vectors count as constants in the backward pass: gradients of queries and keys are those of the "
        "projected output, not those of the vectors.",
        "Where s_k and s_{k+1} are equal, what is removed jumps with rounding; where s_k is in the bulk, some of what "
        "attention selects is removed.",
        "Beyond 128 tokens the vectors are those that the iteration finds: good where they stand out.",
    ),
    cost=(
        "the map of every head as a matrix, O(T²) memory, beside the kernel; its factorisation up to 128 tokens, "
        "beyond that (2·iterations + 3) products of it with k + 8 columns; no parameters"
    ),
)
def deflate_attention(patient: Patient, *, k: int = 1, strength: float = 1.0, iterations: int = 4) -> Edit:
    """Project what heads hand on off the leading left singular vectors of their maps."""
    sites = tuple(site for site in patient.self_attention if not site.first.causal)
    if not sites:
        raise RemedyError(
            "deflate-attention would let tokens of a causal model see later ones: its singular vectors know all of "
            "them; use center-attention."
        )
    least = min(min(site.first.queries, site.first.keys) for site in sites)
    if k >= least:
        raise RemedyError(f"deflate-attention with k={k} would leave nothing of maps of {least} tokens; k < {least}.")

    def make(site: Site) -> Deflated:
        return Deflated(k, strength, iterations)

    return patient.rewrite("deflate-attention", after=make, sites=sites)
