"""Seeing inside any torch model without changing it: blocks, the residual stream, attention calls."""

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.calls import KernelCall
from fullrank.capture.events import (
    AttentionCall,
    Backward,
    Event,
    GradientState,
    Observer,
    ParameterGradient,
    Signal,
    StreamState,
)
from fullrank.capture.recorder import Recorder
from fullrank.capture.register import register_attention
from fullrank.capture.survey import survey
from fullrank.capture.undisturbed import undisturbed

__all__ = [
    "Anatomy",
    "AttentionCall",
    "Backward",
    "Event",
    "GradientState",
    "KernelCall",
    "Observer",
    "ParameterGradient",
    "Recorder",
    "Signal",
    "Stack",
    "StreamState",
    "register_attention",
    "survey",
    "undisturbed",
]
