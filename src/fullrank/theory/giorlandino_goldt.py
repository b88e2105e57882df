r"""Two failure modes of deep transformers: the (q, p) map (Giorlandino and Goldt, arXiv 2505.24333).

A mean-field theory of a transformer at initialisation. Two numbers follow the stream through every block: q, the mean
square of the entries of a token, and p, the mean product of the entries of two tokens; ρ = p/q is `similarity`. Below
the transition of the random energy model attention averages and ρ grows to 1 (rank collapse, kept off by the
residual); above it each query attends to few keys (entropy collapse, which no residual repairs).

Here beside the paper's limit T → ∞: finite contexts (Y₂ and row overlaps of `random_energy`), causal masks by classes
of positions, pre-, peri-, post-norm and none, any activation of `activations`, gated MLPs, grouped queries, normed
queries and keys, parallel blocks. The paper's symbols: $\alpha_{SA}, \alpha_{MLP}$ are `attention_skip`, `mlp_skip`;
$\sigma_v^2$ is `value_gain`; $\beta$ is `gauge` for tokens of rms 1; $\sigma_b^2$ the squares of the `std_bias_…`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption
from fullrank.theory.giorlandino_goldt_course import Layer, Summary, everywhere, late, layers
from fullrank.theory.giorlandino_goldt_map import Attended, BlockMap
from fullrank.theory.giorlandino_goldt_parameters import parameters_of
from fullrank.theory.mean_field import KNOWN_MOMENTS, MANY_TOKENS, NORM_PER_TOKEN, WIDE_HEADS, WIDE_STREAM
from fullrank.theory.random_energy import row_entropy
from fullrank.theory.theory import theory

__all__ = ["attention_limit", "cosine_map", "critical_beta", "giorlandino_goldt"]

Array = NDArray[np.float64]

SOURCE = "theory:giorlandino_goldt"


# ------------------------------------------------------------ the paper's limit


def critical_beta(q: ArrayLike, p: ArrayLike) -> Array:
    r"""$\beta_c = \sqrt{2/(q(q-p))}$: above it attention condenses on few keys as T → ∞.

    β is the gauge of tokens of rms 1: logit variance $\beta^2q^2\log T$. At finite T the first effects show at half of
    it. ∞ where q = p. Source: arXiv 2505.24333, v3.

    Args:
        q: mean square of the entries of a token, > 0.
        p: mean product of the entries of two tokens, ≤ q.

    Returns:
        β_c, of the broadcast shape; √2 at q = 1, p = 0.
    """
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt(2 / (q * np.maximum(q - p, 0.0))))


def attention_limit(q: ArrayLike, p: ArrayLike, Y2: ArrayLike, *, value_gain: ArrayLike = 1.0) -> tuple[Array, Array]:
    r"""$q_S = \sigma_v^2[p + (q-p)Y_2]$, $p_S = \sigma_v^2p$ (Result 1), of attention over infinitely many tokens.

    Args:
        q: mean square of the entries of a token.
        p: mean product of the entries of two tokens.
        Y2: E Σ_s A_ts², $\max(0, 1 - \beta_c/\beta)$ in the limit.
        value_gain: σ_v².

    Returns:
        q and p of what attention writes.
    """
    q, p, Y2, gain = (np.asarray(one, dtype=np.float64) for one in (q, p, Y2, value_gain))
    return np.asarray(gain * (p + (q - p) * Y2)), np.asarray(gain * p)


def cosine_map(rho: ArrayLike, beta: ArrayLike) -> Array:
    r"""$\Phi_S(\rho) = \rho/[(1-\rho)Y_2 + \rho]$: token cosine after attention alone, at q = 1 and T → ∞.

    1 below $\beta_c = \sqrt{2/(1-\rho)}$, where attention averages; $\rho/(1-\sqrt{2(1-\rho)}/\beta)$ above.

    Args:
        rho: ρ in (0, 1].
        beta: β.

    Returns:
        Φ, of the broadcast shape.
    """
    rho, beta = np.asarray(rho, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    Y2 = np.maximum(0.0, 1 - critical_beta(1.0, rho) / np.maximum(beta, 1e-300))
    q, p = attention_limit(1.0, rho, Y2)
    return np.asarray(np.divide(p, q, out=np.zeros(np.broadcast_shapes(p.shape, q.shape)), where=q > 0))


# ------------------------------------------------------------ the theory


def _windowed(architecture: Architecture) -> float:
    return min(1.0, math.sqrt(architecture.visible / (architecture.context * _seen(architecture))))


def _seen(architecture: Architecture) -> float:
    return 0.75 if architecture.mask == "causal" else 1.0


_ASSUMES = (
    KNOWN_MOMENTS,
    NORM_PER_TOKEN,
    Assumption(
        "branches are normed, so that sizes stay bounded",
        lambda one: 0.8 if one.placement == "none" else 1.0,
        "it has no norm",
    ),
    WIDE_STREAM,
    WIDE_HEADS,
    MANY_TOKENS,
    Assumption("every key before a query, or every key, is seen", _windowed, "its window is {window}"),
    Assumption(
        "logits depend on positions through tokens alone",
        lambda one: {"alibi": 0.7, "relative": 0.8}.get(one.positions, 1.0),
        "its positions are {positions}",
    ),
)


@theory(
    "giorlandino_goldt",
    title="mean-field (q, p) map of attention, norms and MLP (arXiv 2505.24333)",
    assumes=_ASSUMES,
    gives=(
        "similarity",
        "residual",
        "rms",
        "token_energy",
        "inverse_participation",
        "normalized_entropy",
        "logit_std",
        "log_context_gauge",
    ),
)
def giorlandino_goldt(architecture: Architecture) -> list[Row]:
    """Rows of the stream and of attention, layer by layer, at the scopes that `examine` gives them.

    Args:
        architecture: of which model.

    Returns:
        States `out` from layer 0 and `mid` from 1, over all tokens and, where attention is causal, over late ones;
        attention `self` as the mean over heads (head None), which are alike in law. The standard error is how far a
        number moves where ρ₀ moves by its own, or as far as cosines of so many tokens go.
    """
    correlation, error = architecture.correlation, architecture.correlation_stderr
    least = -1 / (architecture.context - 1)
    up, down = min(error, 1 - correlation), min(error, correlation - least)
    moved = min(correlation + up, 1.0) if up >= down else max(correlation - down, least)
    block = BlockMap.of(
        parameters_of(architecture, correlation=np.array([correlation, moved] if error else [correlation]))
    )
    return [row for number, layer in enumerate(layers(block)) for row in _rows(block, number, layer)]


def _rows(block: BlockMap, number: int, layer: Layer) -> Iterator[Row]:
    architecture = block.parameters.architecture
    tokens, causal = architecture.context, architecture.mask == "causal"
    states = [("out", layer.out)]
    if layer.mid is not None and not architecture.parallel:
        states.insert(0, ("mid", layer.mid))
    for part, state in states:
        found = {"all": _stream(everywhere(block, state), tokens)}
        if causal:
            found["late"] = _stream(late(block, state), tokens - tokens // 2)
        yield from _made(architecture, number, "stream", part, found)
    if layer.attended is not None:
        yield from _made(architecture, number, "attention", "self", _attention(block, layer.attended))


def _stream(tokens: Summary, count: int) -> dict[str, Array]:
    particular = np.maximum((1 - 1 / count) * (1 - tokens.shared), 0.0)
    return {
        "rms": np.sqrt(tokens.q),
        "similarity": tokens.similarity,
        "residual": np.sqrt(particular),
        "token_energy": particular,
    }


def _attention(block: BlockMap, attended: Attended) -> dict[str, dict[str, Array]]:
    s, keys, Y2 = attended
    log_keys = np.log(np.maximum(keys, 2.0))
    by_class = {
        "normalized_entropy": row_entropy(s, keys) / log_keys,
        "inverse_participation": Y2,
        "logit_std": s,
        "log_context_gauge": s / np.sqrt(log_keys),
    }
    architecture = block.parameters.architecture
    most = min(architecture.context, architecture.window or architecture.context)
    share = block.positions.share * (keys[:, 0] >= min(32.0, most / 4))  # rows that examine counts
    share = share / share.sum()
    found = {"all": {metric: share @ values for metric, values in by_class.items()}}
    if architecture.mask == "causal":
        found["late"] = {metric: values[-1] for metric, values in by_class.items()}
    return found


def _made(
    architecture: Architecture, number: int, site: str, part: str, found: dict[str, dict[str, Array]]
) -> Iterator[Row]:
    for scope, values in found.items():
        for metric, value in values.items():
            error = abs(float(value[-1] - value[0])) or None
            yield Row(
                architecture.stack,
                number,
                site,
                part,
                metric,
                float(value[0]),
                scope=scope,
                stderr=error,
                n=None,
                exact=False,
                source=SOURCE,
            )
