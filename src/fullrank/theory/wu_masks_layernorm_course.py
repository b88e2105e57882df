r"""Wu et al. (arXiv 2405.18781): similarity and residual over the layers of uniform attention, for any mask and window.

**Assumes** blocks $X^+ = A X W$ without a skip past attention, $A$ uniform over the keys that a query sees, $W$ random
(heads, output weight and a linear MLP with or without its own skip make a random matrix as well), no norm that
subtracts or mixes tokens, no biases.

**Symbols.** $N$ `tokens`, $\rho_0$ `correlation` of the tokens before the first block, all of one length. Their Gram
matrix becomes $(1-\rho_0)A^l A^{l\top} + \rho_0\mathbf 1\mathbf 1^\top$, times a common factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.assumption import Assumption
from fullrank.theory.theory import theory

__all__ = ["WU_MASKS_LAYERNORM", "uniform_course"]

Array = NDArray[np.float64]


def uniform_course(
    tokens: int,
    depth: int,
    *,
    correlation: ArrayLike = 0.0,
    causal: bool = False,
    window: int | None = None,
    late: bool = False,
) -> tuple[Array, Array]:
    """Mean cosine and residual of the tokens before the first and after every block.

    Exact for infinite width. O(N² depth) and N² numbers of memory at any depth; O(depth) where every token sees all,
    for tokens are one and the same after the first block.

    Args:
        tokens: N.
        depth: blocks.
        correlation: ρ₀, one or several.
        causal: whether a query sees only itself and what comes before.
        window: keys that a query sees at most; of full attention `window // 2` to each side, besides itself.
        late: whether to look at the later half of the tokens alone.

    Returns:
        Similarity and residual, each of shape (depth + 1, …) with the shape of `correlation` behind.
    """
    rho, start = np.asarray(correlation, float), tokens // 2 if late else 0
    courses = _courses(tokens, depth, rho, [start], causal=causal, window=window)
    found = [one for (one,) in courses]
    return np.asarray([one for one, _ in found]), np.asarray([one for _, one in found])


def _courses(
    tokens: int, depth: int, rho: Array, starts: Sequence[int], *, causal: bool, window: int | None
) -> Iterator[list[tuple[Array, Array]]]:
    """Layer by layer, of the tokens from each of `starts` on."""
    if _all_see_all(tokens, causal=causal, window=window):
        counts = [tokens - start for start in starts]
        yield [(rho, np.sqrt((1 - 1 / count) * (1 - rho))) for count in counts]
        for _ in range(depth):
            yield [(np.ones_like(rho), np.zeros_like(rho)) for _ in starts]
        return
    # at −1/(N−1) itself the mean of all tokens, a causal mask's last token, is 0 and has no cosine: its limit is given
    rho = np.maximum(rho, -(1 - 1e-9) / (tokens - 1))
    for rows in _powers(tokens, depth, causal=causal, window=window):
        yield [_similarity_and_residual(rows[start:], rho) for start in starts]


def _all_see_all(tokens: int, *, causal: bool, window: int | None) -> bool:
    return not causal and (window is None or window // 2 >= tokens - 1)


def _powers(tokens: int, depth: int, *, causal: bool, window: int | None) -> Iterator[Array]:
    """A^l for l = 0 … depth, each from the one before by running sums over the keys that a query sees."""
    behind = min(tokens - 1, tokens if window is None else window - 1 if causal else window // 2)
    ahead = 0 if causal else behind
    place = np.arange(tokens)
    seen = np.minimum(place, behind) + np.minimum(tokens - 1 - place, ahead) + 1.0
    rows = np.eye(tokens)
    yield rows
    for _ in range(depth):
        running = rows.cumsum(0)
        last = np.broadcast_to(running[-1], (ahead, tokens))
        rows = np.concatenate([running[ahead:], last]) if ahead else running.copy()
        rows[behind + 1 :] -= running[: tokens - behind - 1]
        rows /= seen[:, None]
        yield rows


def _similarity_and_residual(rows: Array, rho: Array) -> tuple[Array, Array]:
    """Mean cosine and residual of tokens whose Gram matrix is (1 − ρ)BBᵀ + ρ11ᵀ, without forming it."""
    count = len(rows)
    own, common = 1 - rho[..., None], rho[..., None]
    length = own * np.einsum("ij,ij->i", rows, rows) + common  # of each token, squared
    weight = 1 / np.sqrt(length)
    together = (1 - rho) * np.square(weight @ rows).sum(-1) + rho * weight.sum(-1) ** 2
    centred = rows - rows.mean(0)
    apart = (1 - rho) * np.vdot(centred, centred)
    return np.asarray((together - count) / (count * (count - 1))), np.sqrt(apart / length.sum(-1))


# ------------------------------------------------------------ of an architecture

_UNIFORM = 0.5
_MOST_TOKENS = 1024
"""Followed one by one: the square of it, at every layer, is what a prediction may cost."""


def _few_tokens(architecture: Architecture) -> float:
    one = architecture
    all_see_all = _all_see_all(one.context, causal=one.mask == "causal", window=one.window)
    return float(all_see_all or one.context <= _MOST_TOKENS)


def _without_skip(architecture: Architecture) -> float:
    past_both = architecture.parallel and architecture.mlp_width and architecture.mlp_branch
    return float(architecture.attention_skip == 0 and architecture.attention_branch != 0 and not past_both)


def _uniform(architecture: Architecture) -> float:
    """Logits of spread s change the mean of the values by O(s²/T), which is all that is left where tokens agree."""
    spread = _largest_logit(architecture)
    return 0.0 if architecture.positions == "alibi" or spread > 3 else math.exp(-0.5 * (spread / _UNIFORM) ** 2)


def _largest_logit(architecture: Architecture) -> float:
    """Spread of the logits in the layer where tokens are longest: without a norm they grow, or shrink, with depth."""
    one = architecture
    if one.qk_norm or one.placement in ("pre", "peri"):
        return one.logit_std
    square = one.input_rms**2
    if one.placement != "none":
        return one.logit_std * max(1.0, square)  # tokens are of rms 1 after the first block
    of_mlp = one.mlp_branch**2 * one.width * one.std_up**2 * float(one.mlp_width or 0) * one.std_down**2
    gain = one.attention_branch**2 * one.value_gain * (one.mlp_skip**2 + of_mlp)
    return one.logit_std * square * max(1.0, gain) ** (one.depth - 1)


def _keeps_rows(architecture: Architecture) -> float:
    """A norm over features rescales rows, and the longer ones are the less mixed; one over tokens takes their mean."""
    return {"none": 1.0, "batchnorm": 0.0}.get(architecture.norm, 0.5)


def _linear(architecture: Architecture) -> float:
    no_mlp = architecture.mlp_width == 0 or architecture.mlp_branch == 0
    return 1.0 if no_mlp or (architecture.activation == "identity" and not architecture.gated) else 0.3


def _unbiased(architecture: Architecture) -> float:
    """A bias is one vector for all tokens: it draws them together besides attention."""
    return 1.0 if architecture.std_bias_attention == architecture.std_bias_mlp == 0 else 0.5


@theory(
    "wu_masks_layernorm",
    title="masked attention without skips (arXiv 2405.18781)",
    assumes=(
        Assumption(
            "no skip leads past attention",
            _without_skip,
            "a skip of strength {attention_skip} leads past its attention",
        ),
        Assumption(
            "attention is uniform", _uniform, "its logits are far from equal at initialisation (positions: {positions})"
        ),
        Assumption(
            "every token sees all, or tokens are few enough to follow each",
            _few_tokens,
            "its context is too long to follow token by token",
        ),
        Assumption("no norm is taken over tokens", _keeps_rows, "its norm is {norm}, taken over tokens"),
        Assumption("the MLP is linear", _linear, "its MLP has {activation} units"),
        Assumption("there are no biases", _unbiased, "its branches add biases"),
    ),
    gives=("similarity", "residual"),
)
def WU_MASKS_LAYERNORM(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows over all tokens, and over the late ones where the mask is causal."""
    one = architecture
    spread = one.correlation_stderr
    rho = np.array([one.correlation, max(one.correlation - spread, -1 / (one.context - 1)), one.correlation + spread])
    has_late = one.mask == "causal" and one.context > 2  # of two tokens one is late
    starts = {"all": 0, "late": one.context // 2} if has_late else {"all": 0}
    rows = []
    courses = _courses(
        one.context,
        one.depth,
        np.minimum(rho, 1.0),
        list(starts.values()),
        causal=one.mask == "causal",
        window=one.window,
    )
    for layer, found in enumerate(courses):
        for scope, numbers in zip(starts, found, strict=True):
            where: dict[str, Any] = {
                "stack": one.stack,
                "layer": layer,
                "site": "stream",
                "part": "out",
                "scope": scope,
            }
            for metric, (value, low, high) in zip(("similarity", "residual"), np.stack(numbers).tolist(), strict=True):
                rows.append(
                    Row(
                        **where,
                        metric=metric,
                        value=value,
                        stderr=abs(high - low) / 2 if spread else None,
                        n=None,
                        source="theory:wu_masks_layernorm",
                    )
                )
    return rows
