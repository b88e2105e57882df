"""What every mean-field theory takes for granted, in one place: theories are ranked by degrees that must agree."""

from __future__ import annotations

from typing import Final

from fullrank.theory.activations import ACTIVATIONS
from fullrank.theory.assumption import Assumption

__all__ = ["KNOWN_MOMENTS", "MANY_TOKENS", "NORM_PER_TOKEN", "WIDE_HEADS", "WIDE_STREAM"]

KNOWN_MOMENTS: Final = Assumption(
    "the activation's Gaussian moments are known",
    lambda one: 1.0 if one.activation in ACTIVATIONS or not one.mlp_width else 0.0,
    "the moments of its activation, {activation}, are not known",
)
NORM_PER_TOKEN: Final = Assumption(
    "norms act on one token at a time",
    lambda one: 0.0 if one.norm == "batchnorm" else 1.0,
    "its norm is taken over the batch",
)
WIDE_STREAM: Final = Assumption(
    "the stream is wide: fluctuations between draws fall like 1/√width",
    lambda one: one.width / (one.width + 8.0),
    "its width is {width}",
)
WIDE_HEADS: Final = Assumption(
    "heads are wide: logits of a head are Gaussian and keys alike",
    lambda one: float(one.head_width or 1) / (float(one.head_width or 1) + 2.0),
    "its heads are {head_width} wide",
)
MANY_TOKENS: Final = Assumption(
    "there are many tokens, their pairs alike",
    lambda one: one.context / (one.context + 4.0),
    "its context is {context}",
)
