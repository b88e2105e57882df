"""How far an output distribution has moved, document by document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.anatomy import Anatomy
from fullrank.diagnosis.by_document import by_document, real_outputs
from fullrank.diagnosis.outcomes import Measured, Unmeasured, finite, logits_in

__all__ = ["MEMORY", "Distributions"]

MEMORY = 1 << 30
"""Bytes of unchanged logits that are kept; of longer batches evenly spaced tokens."""

_AT_ONCE = 1 << 22
"""Logits that are softmaxed at a time."""


class Distributions(Measured):
    """Σ p (log p − log q) of the unchanged softmax p and the changed q, in nats: mean over a document's real tokens.

    Args:
        anatomy: of the model.
        memory: bytes of unchanged logits to keep for one run; where there are more, evenly spaced tokens are kept.
    """

    name = "distribution"

    def __init__(self, anatomy: Anatomy, *, memory: int = MEMORY) -> None:
        self._anatomy, self._memory = anatomy, memory
        self._kept: list[list[tuple[Tensor, Tensor]]] = []  # by run and document: which tokens, and their logits
        self._every = 1

    def see(self, output: Any, sequences: int, real: Tensor | Mapping[str, Tensor] | None) -> None:
        """Keep the logits of real tokens."""
        logits = by_document(self._logits(output), sequences, self._anatomy)
        mask = real_outputs(real, logits, self._anatomy)
        finite(logits.logsumexp(-1)[mask])  # of −∞ a model may make what it likes
        tokens = int(mask.sum())
        every = max(1, -(-tokens * logits.shape[-1] * logits.element_size() // self._memory))
        self._every = max(self._every, every)
        kept = []
        for document, which in zip(logits, mask, strict=True):
            places = which.nonzero()[:, 0]
            places = places[min(every // 2, max(0, len(places) - 1)) :: every]
            kept.append((places, document[places]))
        self._kept.append(kept)

    def changes(self, run: int, output: Any) -> Tensor:
        """The divergences."""
        logits = by_document(self._logits(output), len(self._kept[run]), self._anatomy)
        pairs = zip(self._kept[run], logits, strict=True)
        return torch.stack([_divergence(p, changed[places]) for (places, p), changed in pairs])

    def _logits(self, output: Any) -> Tensor:
        found = logits_in(output, self._anatomy)
        if found is None:
            raise Unmeasured("the model returns logits for some batches only.")
        return found

    @property
    def documents(self) -> int:
        """Over all runs."""
        return sum(map(len, self._kept))

    @property
    def words(self) -> str:
        """What is measured."""
        some = "" if self._every == 1 else f" (one token in {self._every})"
        return f"the change of the output distribution, in nats of KL, over {self.documents} documents{some}"


def _divergence(unchanged: Tensor, changed: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax unchanged ‖ softmax changed), in float64; logits of −∞ have no share."""
    total = unchanged.new_zeros((), dtype=torch.float64)
    rows = max(1, _AT_ONCE // unchanged.shape[-1])
    for one, other in zip(unchanged.split(rows), changed.split(rows), strict=True):
        one, other = (x if x.dtype == torch.float64 else x.float() for x in (one, other))
        log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
        p = log_p.exp()
        total += torch.where(p > 0, p * (log_p - log_q), 0).sum(dtype=torch.float64)
    return total / len(unchanged)
