"""Which values an architecture may have, and which go together."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from fullrank.errors import ArchitectureError

if TYPE_CHECKING:
    from fullrank.architecture.architecture import Architecture

__all__ = ["require_consistent"]

_LEAST = {"depth": 1, "width": 1, "heads": 1, "key_value_heads": 1, "head_width": 1, "mlp_width": 0, "window": 1}
_SIGNED = {"attention_branch", "mlp_branch", "attention_skip", "mlp_skip", "logit_scale"}
_POSITIVE = {"softcap", "input_rms"}


def require_consistent(architecture: Architecture) -> None:
    """Refuse what no transformer can be.

    Args:
        architecture: whose fields are looked at, before defaults are filled in.

    Raises:
        ArchitectureError: in one sentence that names the field, what was found and what is accepted.
    """
    for name, kind, options in _accepted():
        _require(name, getattr(architecture, name), kind, options)
    _together(architecture)


@functools.cache
def _accepted() -> tuple[tuple[str, Any, tuple[Any, ...]], ...]:
    """Every field with its type and its options, looked up once: what is accepted is written where the fields are."""
    from fullrank.architecture import architecture as home

    hints = typing.get_type_hints(home.Architecture, vars(home) | {"nn": None})
    found = []
    for field in dataclasses.fields(home.Architecture):
        options = typing.get_args(hints[field.name])
        literal = typing.get_origin(hints[field.name]) is typing.Literal
        kind = next((one for one in options if one is not type(None)), hints[field.name])
        found.append((field.name, typing.Literal if literal else kind, options))
    return tuple(found)


def _require(name: str, value: Any, kind: Any, options: tuple[Any, ...]) -> None:
    if value is None and type(None) in options:
        return
    if kind is typing.Literal:
        if value not in options:
            _refuse(name, value, f"one of {', '.join(map(repr, options))}")
    elif kind is bool:
        if not isinstance(value, bool):
            _refuse(name, value, "True or False")
    elif kind is str:
        if not isinstance(value, str):
            _refuse(name, value, "text")
    elif kind is int:
        least = _LEAST.get(name, 2)
        whole = type(value) is int or (type(value) is not bool and isinstance(value, Integral))
        if not whole or int(value) < least:
            _refuse(name, value, f"a whole number of {least} or more")
    elif type(value) is bool or not isinstance(value, float | Real) or not math.isfinite(value):
        _refuse(name, value, "a finite number")
    else:
        _in_range(name, float(value))


def _in_range(name: str, value: float) -> None:
    if name == "dropout" and not 0 <= value < 1:
        _refuse(name, value, "a probability below 1")
    if name == "correlation" and not -1 <= value <= 1:
        _refuse(name, value, "a cosine between -1 and 1")
    if name == "correlation_stderr" and value > 1:
        _refuse(name, value, "1 or less, as cosines are")
    if name in _POSITIVE and value <= 0:
        _refuse(name, value, "a positive number")
    if name not in _SIGNED | {"correlation"} and value < 0:
        _refuse(name, value, "0 or a positive number")


def _together(architecture: Architecture) -> None:
    one = architecture
    if one.head_width is None and one.width % one.heads:
        raise ArchitectureError(
            f"heads={one.heads} do not divide width={one.width}: give a number that does, or head_width."
        )
    if one.key_value_heads is not None and one.heads % one.key_value_heads:
        raise ArchitectureError(
            f"key_value_heads={one.key_value_heads} must divide heads={one.heads}: as many queries share each."
        )
    if (one.norm == "none") != (one.placement == "none"):
        raise ArchitectureError(
            f"norm={one.norm!r} and placement={one.placement!r} do not go together: both are 'none', or neither."
        )
    if one.correlation < -1 / (one.context - 1):
        raise ArchitectureError(
            f"correlation={one.correlation} is impossible among {one.context} tokens: their mean cosine is "
            f"-1/{one.context - 1} or more."
        )


def _refuse(name: str, value: Any, accepted: str) -> None:
    raise ArchitectureError(f"{name}={value!r} must be {accepted}.")
