"""SPEC: from a line of text to a loaded model and what it is fed."""

from fullrank.spec.batches import Inputs, inputs
from fullrank.spec.grammar import Spec, parse
from fullrank.spec.loading import demo, load
from fullrank.spec.module import subject_of
from fullrank.spec.subject import Positions, Subject

__all__ = ["Inputs", "Positions", "Spec", "Subject", "demo", "inputs", "load", "parse", "subject_of"]
