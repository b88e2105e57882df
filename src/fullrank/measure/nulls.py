"""What the same observer sees in isotropic Gaussian tokens of the same shape: the line a profile is read against."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from fullrank import metrics
from fullrank.capture.events import StreamState
from fullrank.measure.stream import StackShape, StreamObserver

__all__ = ["gaussian_nulls"]

_SIMULATED_TOKENS = 8192  # sequences beyond this many tokens add nothing to the means of single sequences


@functools.lru_cache(maxsize=256)  # a series of checkpoints asks for the same shapes again
def gaussian_nulls(shape: StackShape, *, causal: bool, seed: int = 0) -> Mapping[str, float]:
    """The null of every stream metric, for the tokens of the headline scope.

    Two independent Gaussian states are shown to a `StreamObserver` as the states before and after a block, so that each
    number is taken exactly as it is taken from a model; the energy shares, which depend on how many sequences there
    are, are in closed form.

    Args:
        shape: tokens per sequence, width and sequences of the stack.
        causal: whether the headline is over late tokens, for the metrics that are taken over them.
        seed: of the draw.

    Returns:
        Metric to value.
    """
    if shape.tokens < 2:
        return MappingProxyType({})
    sequences = max(2, min(shape.sequences, _SIMULATED_TOKENS // shape.tokens))
    generator = torch.Generator().manual_seed(seed)
    observer = StreamObserver(causal=["null"] if causal else [])
    for layer in range(2):
        X = torch.randn(sequences, shape.tokens, shape.width, generator=generator)
        observer.see(StreamState("null", layer, "stream", "out", "", X))
    by_scope: dict[str, dict[str, float]] = {"all": {}, "late": {}}
    for row in observer.rows():
        if row.value is not None and row.scope in by_scope:
            by_scope[row.scope][row.metric] = row.value
    found = by_scope["all"] | by_scope["late"]
    found.pop("max_abs_position", None)  # any place is as likely
    tokens = shape.tokens - shape.tokens // 2 if causal else shape.tokens
    for metric in ("shared_energy", "sequence_energy", "token_energy"):
        found[metric] = metrics.null_value(metric, tokens=tokens, width=shape.width, sequences=max(shape.sequences, 1))[
            0
        ]
    return MappingProxyType({metric: value for metric, value in found.items() if not math.isnan(value)})
