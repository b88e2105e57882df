"""Batch norms that have seen no batch: a fresh network with them is not yet the one that will be trained."""

from __future__ import annotations

from fullrank.diagnosis.evidence import Evidence

__all__ = ["unused_norms"]

_SAID = "no batch norm of this model has seen a batch"  # among the notes of a report


def unused_norms(evidence: Evidence) -> str:
    """Why nothing can be said of the size of a fresh model's signal; empty where it can."""
    # with their initial mean 0 and variance 1 batch norms only hand on, and signals die out that they would hold
    if evidence.weights == "fresh" and any(_SAID in str(note) for note in evidence.about.get("notes") or ()):
        return "needs batch norms that have seen a batch, or those of this one (batch_statistics=True)."
    return ""
