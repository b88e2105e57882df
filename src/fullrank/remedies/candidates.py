"""Which remedies to try first for a failure: a short list for each, from what papers say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["CANDIDATES", "candidates_for"]

CANDIDATES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "rank-collapse-depth": (
            "residual-scale",
            "deepnorm",
            "lambda-skip?strength=4",
            "center-attention",
            "value-residual?kind=fixed",
            "layer-scale?start=0.1",
        ),
        "rank-collapse-width": (
            "center-attention?gain=energy",
            "temperature?kind=log-context",
            "qk-scale-init",
            "attn-scale?start=4",
            "differential",
        ),
        "dead-depth": ("layernorm-scaling", "scaled-init", "residual-scale", "peri-norm", "value-residual"),
        "vanishing-or-exploding": ("residual-scale", "deepnorm", "scaled-init", "peri-norm", "layernorm-scaling"),
        "numerics": ("qk-norm", "softcap", "qk-clip", "position-gate", "peri-norm"),
        "entropy-collapse": ("qk-norm", "sigma-reparam", "qk-clip", "softcap", "temperature?kind=entropy"),
        "averaging-heads": ("temperature?kind=entropy", "qk-scale-init", "attn-scale?start=4", "differential"),
        "query-key-starvation": ("residual-scale", "temperature?kind=balance", "qk-scale-init", "deepnorm"),
        "redundant-heads": ("position-gate", "orthogonal-init", "differential"),
        "context-dilution": ("temperature?kind=log-context", "local-mask", "softpick"),
        "sinks": ("learned-sink", "position-gate", "softpick", "registers"),
        "at-the-floor": ("residual-scale", "deepnorm", "value-residual?kind=fixed", "center-attention"),
    }
)
"""By name of the failure, in the order in which they are tried: what papers say, and no measurement of a model."""


def candidates_for(failures: Iterable[str], *, most: int) -> tuple[str, ...]:
    """Remedies to try for some failures: the first of each failure, then the second of each, and so on.

    Args:
        failures: names, gravest first.
        most: how many.

    Returns:
        Each once.
    """
    lists = [CANDIDATES.get(name, ()) for name in dict.fromkeys(failures)]
    rounds = (one[at] for at in range(max(map(len, lists), default=0)) for one in lists if at < len(one))
    return tuple(dict.fromkeys(rounds))[:most]
