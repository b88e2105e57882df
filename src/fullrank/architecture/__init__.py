"""What theories need to know of a transformer: sizes, norms, scales, initial standard deviations. Data only."""

from fullrank.architecture.architecture import Architecture

__all__ = ["Architecture"]
