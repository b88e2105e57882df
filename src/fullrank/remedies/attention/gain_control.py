"""Gain-controlled attention: what attention hands on, without what it hands to all tokens alike."""

from __future__ import annotations

from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.errors import RemedyError
from fullrank.remedies.attention.branch_gain import GAINS, centred_attention
from fullrank.remedies.attention.visible_mean import visible_of
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["gain_control"]


@remedy(
    "gain-control",
    "attention whose output is centred over tokens",
    addresses=("rank-collapse-depth", "averaging-heads"),
    acts_on="attention",
    exactness="changes-function",
    formula=(
        "O ← g (I − U) O, O = AV per head; U_ts = 1/#visible(t): the token mean of the output is removed where "
        "attention is full, the mean over the tokens that a query sees where it is causal, windowed or padded"
    ),
    papers=(
        "Giorlandino, Goldt: Two failure modes of deep transformers and how to avoid them, ICLR 2026, arXiv 2505.24333 "
        "(full attention; the causal form is not in it)",
    ),
    keys=("giorlandino_goldt",),
    parameters=GAINS,
    limits=(
        "The same mean-field update as center-attention, (q − p)Y₂ to the norm and 0 to the overlap of tokens, by "
        "another matrix: it centres the output and not the values.",
        "With logits of small scale little is left of the branch: use a gain, or a larger scale of queries and keys.",
        "Needs the outputs of all tokens that a query sees: it does not run with a key-value cache, and says so.",
        "A trained model does not keep its function: it is meant for training from the start.",
        "Biases of the values and of the output projection are common to all tokens; those of the values are removed.",
    ),
    cost=(
        "a mean over the outputs per call, O(T), also where causal, padded or windowed by the kernel's flags; a mask "
        "with a row for every query costs one more product, O(T²). Fused kernels stay; no parameters, unless gains are "
        "learnt"
    ),
)
def gain_control(patient: Patient, *, gain: str = "none", factor: float = 1.0, learn: bool = False) -> Edit:
    """Subtract from what every self-attention hands on its mean over the visible tokens."""
    return centred_attention(
        patient,
        "gain-control",
        less_mean_of_outputs,
        gain=gain,
        factor=factor,
        learn=learn,
        sites=patient.self_attention,
    )


def less_mean_of_outputs(call: Call, output: Tensor) -> Tensor:
    """(I − U)O.

    Args:
        call: as it was made.
        output: O, (batch, heads, queries, width).

    Returns:
        It, in the same shape.

    Raises:
        RemedyError: where outputs of earlier tokens are missing, as with a cache.
    """
    if call.queries != call.keys:
        raise RemedyError(
            f"gain-control averages over the outputs of all visible tokens, and {call.place.path} has {call.queries} "
            f"queries for {call.keys} keys; run without a key-value cache (use_cache=False)."
        )
    return output - visible_of(call).mean(output)
