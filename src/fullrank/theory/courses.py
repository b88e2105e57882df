"""From a theory's correlation and size over depth to rows of the stream, in the schema of `examine`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row

__all__ = ["headline_scope", "stream_rows"]


def headline_scope(architecture: Architecture) -> str:
    """`late` for causal attention, `all` elsewhere: what a theory of many visible keys speaks of."""
    return "late" if architecture.mask == "causal" else "all"


def stream_rows(
    key: str,
    architecture: Architecture,
    correlation: NDArray[Any],
    *,
    error: NDArray[Any] | None = None,
    mean_square: NDArray[Any] | None = None,
    scope: str | None = None,
) -> list[Row]:
    r"""Rows of `similarity`, `residual` and, where the size is known, `rms`, of the stream after every block.

    For tokens of one norm $\text{residual} = \sqrt{(1 - 1/n)(1 - \rho)}$ over $n$ tokens; its error is that of ρ,
    carried over.

    Args:
        key: of the paper's card.
        architecture: of which.
        correlation: ρ after ℓ blocks, ℓ = 0 … depth, of shape (depth + 1,).
        error: standard error of ρ, of the same shape; none where omitted.
        mean_square: of the stream's entries, of the same shape; no row where it is infinite.
        scope: of the rows; by default the headline's.

    Returns:
        Rows, layer by layer.
    """
    where: dict[str, Any] = {
        "source": f"theory:{key}",
        "stack": architecture.stack,
        "site": "stream",
        "part": "out",
        "head": None,
    }
    where["scope"] = scope or headline_scope(architecture)
    count = architecture.context if where["scope"] == "all" else max(2, architecture.context // 2)
    share = 1 - 1 / count
    rows = []
    for layer, rho in enumerate(np.clip(correlation, -1.0, 1.0).tolist()):
        wrong = None if error is None else float(error[layer])
        residual = (share * (1 - rho)) ** 0.5
        numbers = [("similarity", rho, wrong)]
        numbers.append(("residual", residual, None if wrong is None or not residual else wrong * share / 2 / residual))
        if mean_square is not None and np.isfinite(mean_square[layer]):
            numbers.append(("rms", float(mean_square[layer]) ** 0.5, None))
        rows += [
            Row(**where, layer=layer, metric=metric, value=value, stderr=stderr, n=None, exact=True)
            for metric, value, stderr in numbers
        ]
    return rows
