"""Attention as a linear map over tokens, never stored unless small: masks, scores, products, summaries, spectra."""

from fullrank.operators.attention import AttentionMap, AttentionOperator
from fullrank.operators.dense import DenseAttention
from fullrank.operators.masks import (
    Arbitrary,
    BlockLocal,
    Causal,
    Full,
    Intervals,
    Mask,
    Packed,
    Padding,
    Prefix,
    SlidingWindow,
    from_additive,
    recognise,
)
from fullrank.operators.scores import Scores
from fullrank.operators.summary import Summary
from fullrank.operators.uniform import Difference, Uniform

__all__ = [
    "Arbitrary",
    "AttentionMap",
    "AttentionOperator",
    "BlockLocal",
    "Causal",
    "DenseAttention",
    "Difference",
    "Full",
    "Intervals",
    "Mask",
    "Packed",
    "Padding",
    "Prefix",
    "Scores",
    "SlidingWindow",
    "Summary",
    "Uniform",
    "from_additive",
    "recognise",
]
