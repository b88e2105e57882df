"""Small random models of every family that capture must see into."""

from __future__ import annotations

import families_other
import families_text
import torch
from seen import Case

from tiny import ENDS, FAMILIES, IMAGE, TEXT, floats, ids

__all__ = ["ENDS", "FAMILIES", "IMAGE", "TEXT", "build", "families_other", "families_text", "floats", "ids"]


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
