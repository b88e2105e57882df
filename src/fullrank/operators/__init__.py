"""Attention as a linear map over tokens, never stored unless small: masks, scores, products, summaries, spectra."""

from fullrank.operators.attention import AttentionMap, AttentionOperator
from fullrank.operators.dense import DenseAttention
from fullrank.operators.krylov import Spectrum, leading_singular_values
from fullrank.operators.linear import Centred, LinearOperator, Matrix, MatrixFree, Restricted
from fullrank.operators.markov import exponential_markov, gaussian_logit_markov, lognormal_markov
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
from fullrank.operators.spectra import (
    AttentionSpectra,
    attention_singular_values,
    attention_spectra,
    full_spectrum,
)
from fullrank.operators.summary import Summary
from fullrank.operators.uniform import Difference, Uniform

__all__ = [
    "Arbitrary",
    "AttentionMap",
    "AttentionOperator",
    "AttentionSpectra",
    "BlockLocal",
    "Causal",
    "Centred",
    "DenseAttention",
    "Difference",
    "Full",
    "Intervals",
    "LinearOperator",
    "Mask",
    "Matrix",
    "MatrixFree",
    "Packed",
    "Padding",
    "Prefix",
    "Restricted",
    "Scores",
    "SlidingWindow",
    "Spectrum",
    "Summary",
    "Uniform",
    "attention_singular_values",
    "attention_spectra",
    "exponential_markov",
    "from_additive",
    "full_spectrum",
    "gaussian_logit_markov",
    "leading_singular_values",
    "lognormal_markov",
    "recognise",
]
