"""Observers: what capture sees becomes rows of the table."""

from fullrank.measure.attention import AttentionObserver
from fullrank.measure.gradients import GradientObserver
from fullrank.measure.memory import FreedMemory
from fullrank.measure.nulls import gaussian_nulls
from fullrank.measure.parameters import ParameterObserver
from fullrank.measure.spectra import SpectrumObserver
from fullrank.measure.stream import StreamObserver

__all__ = [
    "AttentionObserver",
    "FreedMemory",
    "GradientObserver",
    "ParameterObserver",
    "SpectrumObserver",
    "StreamObserver",
    "gaussian_nulls",
]
