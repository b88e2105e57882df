"""Small random models of every family that capture must see into, and one look at each that all tests share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import families_audio
import families_decoders
import families_encoders
import families_experts
import families_hybrids
import families_multimodal
import families_other
import families_pairs
import families_text
import families_torch
import families_vision
import torch
from family import ENDS, FAMILIES, IMAGE, REFUSED, TEXT, floats, ids
from seen import Case, Keep, record

from fullrank.capture import Recorder
from untouched import changes, everything

__all__ = ["ENDS", "FAMILIES", "IMAGE", "REFUSED", "TEXT", "Observed", "build", "floats", "ids", "observed"]
__all__ += ["families_audio", "families_hybrids", "families_multimodal", "families_pairs", "families_vision"]
__all__ += [
    "families_decoders",
    "families_encoders",
    "families_experts",
    "families_other",
    "families_text",
    "families_torch",
]


def build(family: str) -> Case:
    """A case in evaluation mode, its matrices drawn large enough that attention is not uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = FAMILIES[family]()
        with torch.no_grad():
            for parameter in case.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    case.model.eval()
    return case


@dataclass(frozen=True)
class Observed:
    """A family's case and three forwards of it: before, under and after the recorder; what looking has changed."""

    case: Case
    keep: Keep
    recorder: Recorder
    before: Any
    during: Any
    after: Any
    changed: list[str]


@functools.cache
def observed(family: str) -> Observed:
    """Survey and record a family, once for all tests; they read and change nothing."""
    case = build(family)
    before = case.run()
    state = everything(case.model)
    keep, recorder, during = record(case.model, case.run)
    changed = changes(state, everything(case.model))
    return Observed(case, keep, recorder, before, during, case.run(), changed)
