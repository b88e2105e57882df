"""The vocabulary of outputs: what a model says of the next token."""

import math
from typing import Final

from fullrank.metrics.definition import Definition, Invariance

__all__ = ["OUTPUTS"]

OUTPUTS: Final = (
    Definition(
        name="token_loss",
        definition="Mean cross-entropy of the next token, log Σ_w e^{z_w} − z_y over the words w, y the one that "
        "follows: the model's own loss, by position. With more context before a token it falls where the context is "
        "of use.",
        unit="nats",
        range=(0.0, math.inf),
        healthy="falls with the context",
        collapsed="log of the number of words, or the same at every position",
        null="log of the number of words, where all are equally likely",
        source="definition",
        level="output",
        per_head=False,
        cost="one more forward, and O(T W) for W words",
        invariances=frozenset[Invariance]({"token_permutation"}),
    ),
)
