"""Masks know which keys a query sees: how many, which range, and which blocks need no look at all."""

from fullrank.operators.masks.base import Both, Mask, Shape, Span
from fullrank.operators.masks.intervals import BlockLocal, Causal, Full, Intervals, Prefix, SlidingWindow
from fullrank.operators.masks.recognise import from_additive, recognise
from fullrank.operators.masks.tensors import Arbitrary, Packed, Padding

__all__ = [
    "Arbitrary",
    "BlockLocal",
    "Both",
    "Causal",
    "Full",
    "Intervals",
    "Mask",
    "Packed",
    "Padding",
    "Prefix",
    "Shape",
    "SlidingWindow",
    "Span",
    "from_additive",
    "recognise",
]
