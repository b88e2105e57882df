"""Which dtypes a model's numbers must fit, and the largest number of each."""

from __future__ import annotations

import torch

from fullrank.diagnosis.evidence import Evidence

__all__ = ["dtypes_of", "largest_number"]


def dtypes_of(evidence: Evidence) -> list[str]:
    """Names of the run's own dtype, then of those whose range was asked for."""
    return list(dict.fromkeys((evidence.dtype, *evidence.dtypes)))


def largest_number(dtype: str) -> float:
    """The largest finite number of a dtype: 65504 of `float16`, 448 of `float8_e4m3`."""
    found = getattr(torch, dtype, None) or getattr(torch, f"{dtype}fn")  # float8_e4m3 is called float8_e4m3fn
    return float(torch.finfo(found).max)
