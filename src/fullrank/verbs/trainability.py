"""`trainability`: which values of one or two fields leave an architecture trainable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fullrank.architecture import Architecture
from fullrank.architecture.shorthands import SHORTHANDS, field_names
from fullrank.errors import TheoryError
from fullrank.report.trainability_map import Axis, TrainabilityMap
from fullrank.theory.giorlandino_goldt_trainability import PHASES, phases
from fullrank.verbs.predict import architecture_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["trainability"]


def trainability(
    subject: Architecture | nn.Module | str,
    batch: Any = None,
    *,
    context: int | None = None,
    collapsed: float = 0.99,
    seed: int = 0,
    vary: Mapping[str, ArrayLike],
) -> TrainabilityMap:
    """The phase that the mean-field map gives each point of a line or a plane through an architecture.

    Args:
        subject: as `predict` takes it.
        batch: for a module, what its tokens' correlation is measured on.
        context: tokens in a sequence; by default the architecture's.
        collapsed: similarity after the last block from which on tokens count as one.
        seed: of the draw, for a SPEC.
        vary: one or two fields of an `Architecture`, or shorthands for several (`residual_scale`, `skip_scale`,
            `qk_std`, `value_std`, `mlp_std`), each with the values that it takes.

    Returns:
        The map, with the architecture's own place in it.

    Raises:
        ArchitectureError: for values that no architecture can have.
        TheoryError: for fields that cannot vary, none or more than two of them, or an architecture that the map does
            not speak of.
    """
    _require_fields(vary)
    architecture = architecture_of(subject, batch, context=context, seed=seed)
    _require_spoken_of(architecture)
    axes = [Axis(name, np.asarray(values, float), own_value(architecture, name)) for name, values in vary.items()]
    whole = {name for name in vary if all(_whole(field) for field in SHORTHANDS.get(name, (name,)))}
    grids = np.meshgrid(*(axis.values for axis in axes), indexing="ij", sparse=True)
    fields: dict[str, Any] = {
        axis.name: grid.astype(np.int64) if axis.name in whole else grid for axis, grid in zip(axes, grids, strict=True)
    }
    found = phases(architecture, collapsed=collapsed, **fields)
    return TrainabilityMap(str(architecture), tuple(axes), PHASES, found.phase, found.similarity, found.gauge)


def own_value(architecture: Architecture, name: str) -> float | None:
    """The architecture's own place on an axis.

    The map knows of W_Q and W_K, and of W_V and W_O, only the product of their deviations: there a shorthand has the
    geometric mean. Elsewhere what a shorthand stands for must be equal, to the two hundredths that drawn weights vary.

    Args:
        architecture: which one.
        name: of a field or a shorthand.

    Returns:
        The value; None where a shorthand stands for several, or the field has none.
    """
    fields = SHORTHANDS.get(name, (name,))
    if name == "mlp_std" and not architecture.gated:
        fields = ("std_up", "std_down")
    values = [getattr(architecture, field) for field in fields]
    if None in values:
        return None
    if name in ("qk_std", "value_std"):
        return math.sqrt(values[0] * values[1])
    return sum(values) / len(values) if max(values) - min(values) <= 0.02 * abs(max(values)) else None


def _require_fields(vary: Mapping[str, Any]) -> None:
    if not 1 <= len(vary) <= 2:
        raise TheoryError(f"vary= names {len(vary)} fields: a map has one or two.")
    numeric = _numeric()
    for name, values in vary.items():
        if name not in numeric:
            raise TheoryError(f"vary= names {name!r}: what can vary is {', '.join(numeric)}.")
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iuf" or len(array) < 2 or not np.isfinite(array).all():
            raise TheoryError(f"vary= gives {name} {values!r}: give it a list of two finite numbers or more.")


def _numeric() -> tuple[str, ...]:
    left_out = {"correlation_stderr", "dropout", "softcap", "key_value_heads", "input_rms"}
    plain = Architecture(depth=1, width=8)
    fields = [name for name in field_names(Architecture) if _is_number(getattr(plain, name)) or name == "window"]
    return (*SHORTHANDS, *(name for name in fields if name not in left_out))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(field: str) -> bool:
    return isinstance(getattr(Architecture(depth=1, width=8, window=1), field), int)


def _require_spoken_of(architecture: Architecture) -> None:
    from fullrank.theory.giorlandino_goldt import giorlandino_goldt

    if reasons := giorlandino_goldt.reasons(architecture):
        raise TheoryError(f"the mean-field map says nothing of this architecture: {'; '.join(reasons)}.")
