"""Orthogonal initialisation: every weight of a block drawn from the Haar measure, times a gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.capture.weights import Weight
from fullrank.edit import Edit
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import change_weights, head_rows
from fullrank.remedies.weights.drawing import SEED, unscaled_queries

__all__ = ["haar", "orthogonal_init"]

_ROLES = {"attention": ("q", "k", "v", "o"), "mlp": ("up", "gate", "down")}
_ROLES["all"] = _ROLES["attention"] + _ROLES["mlp"]


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal columns, or rows where these are fewer, uniform among all of them; float64, CPU.

    Q of the QR decomposition of a normal matrix, with the signs for which R has a positive diagonal: without them it
    is not uniform. Cost O(rows · columns · min(rows, columns)).

    Args:
        rows: number of rows.
        columns: number of columns.
        generator: on the CPU.

    Returns:
        (rows, columns).
    """
    wide = rows < columns
    G = torch.randn(*((columns, rows) if wide else (rows, columns)), generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(G)
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    drawn: Tensor = Q.mT if wide else Q
    return drawn


@remedy(
    "orthogonal-init",
    "weights drawn orthogonal, so that no direction is lost in depth",
    addresses=("vanishing-or-exploding", "rank-collapse-width", "dead-depth"),
    acts_on="weights",
    exactness="init-only",
    formula="W ← g·Q, Q Haar: QᵀQ = I, or QQᵀ = I where it has fewer rows than columns",
    papers=("Meterez, Joudaki, Orabona, Immer, Rätsch, Daneshmand, ICLR 2024, arXiv 2310.02012",),
    keys=("batchnorm",),
    parameters=(
        Parameter("gain", "all singular values of W_Q, W_K, W_V and W_O", 1.0, above=0.0, low=0.0, high=100.0),
        Parameter("mlp_gain", "those of the MLP; √2 keeps the size behind ReLU", 1.0, above=0.0, low=0.0, high=100.0),
        Parameter(
            "by",
            "one matrix of all heads, or one for each head (columns of W_O, rows of the others)",
            "whole",
            kind="choice",
            choices=("whole", "head"),
        ),
        Parameter("roles", "which weights", "all", kind="choice", choices=("all", "attention", "mlp")),
        SEED,
    ),
    limits=(
        "For fresh weights: it replaces what was learnt.",
        "Shown for linear networks with batch norm; attention and nonlinearities are not orthogonal whatever the "
        "weights.",
        "Where scores are not scaled by 1/√d_h (T5, GPT-Neo) W_Q is smaller by what is missing, as measured.",
    ),
    cost="one QR decomposition per weight, on the CPU in float64: minutes for models of billions of parameters",
    structural=False,
)
def orthogonal_init(
    patient: Patient,
    *,
    gain: float = 1.0,
    mlp_gain: float = 1.0,
    by: str = "whole",
    roles: str = "all",
    seed: int = 0,
) -> Edit:
    """Draw weights of the blocks from the Haar measure."""
    generator = torch.Generator().manual_seed(seed)
    queries = unscaled_queries(patient) if "q" in _ROLES[roles] else None

    def new(stack: str, layer: int, weight: Weight) -> Callable[[Tensor], Tensor]:
        size = gain if weight.role in _ROLES["attention"] else mlp_gain
        size *= queries(stack, layer, weight) if queries else 1
        heads = head_rows(weight) if by == "head" else []
        return lambda W: size * _drawn(W, weight.role == "o", heads, generator)

    edit = change_weights(patient, new, *_ROLES[roles])
    if queries is not None:
        edit.notes = (*edit.notes, *queries.notes)
    return edit


def _drawn(W: Tensor, outputs: bool, heads: list[list[int]], generator: torch.Generator) -> Tensor:
    if not heads:
        return haar(W.shape[0], W.shape[1], generator).to(W)
    Q = W.mT.clone() if outputs else W.clone()
    for rows in dict.fromkeys(map(tuple, heads)):
        drawn = haar(W.shape[0], len(rows), generator).mT if outputs else haar(len(rows), W.shape[1], generator)
        Q[list(rows)] = drawn.to(W)
    return Q.mT if outputs else Q
