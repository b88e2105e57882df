"""Names for several fields at once, and the fields themselves."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

__all__ = ["SHORTHANDS", "field_names"]

SHORTHANDS: Final[dict[str, tuple[str, ...]]] = {
    "residual_scale": ("attention_branch", "mlp_branch"),
    "skip_scale": ("attention_skip", "mlp_skip"),
    "qk_std": ("std_q", "std_k"),
    "value_std": ("std_v", "std_o"),
    "mlp_std": ("std_up", "std_gate", "std_down"),
}
"""What each stands for."""


def field_names(of: Any) -> tuple[str, ...]:
    """The fields of a dataclass, in their order."""
    return tuple(field.name for field in dataclasses.fields(of))
