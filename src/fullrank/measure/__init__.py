"""Observers: what capture sees becomes rows of the table."""

from fullrank.measure.attention import AttentionObserver
from fullrank.measure.gradients import GradientObserver
from fullrank.measure.heads import HeadObserver
from fullrank.measure.memory import FreedMemory
from fullrank.measure.nulls import gaussian_nulls
from fullrank.measure.parameters import ParameterObserver
from fullrank.measure.spectra import SpectrumObserver
from fullrank.measure.stream import StreamObserver
from fullrank.measure.weights import weight_rows

__all__ = [
    "AttentionObserver",
    "FreedMemory",
    "GradientObserver",
    "HeadObserver",
    "ParameterObserver",
    "SpectrumObserver",
    "StreamObserver",
    "gaussian_nulls",
    "weight_rows",
]
