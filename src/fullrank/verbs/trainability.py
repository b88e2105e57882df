"""`trainability`: which values of one or two fields leave an architecture trainable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.architecture import Architecture
from fullrank.architecture.shorthands import SHORTHANDS, field_names
from fullrank.errors import TheoryError
from fullrank.report.trainability_map import Axis, TrainabilityMap
from fullrank.theory.giorlandino_goldt_trainability import PHASES, Phases, phases
from fullrank.verbs.predict import architecture_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["trainability"]

_LINKED = ("width", "heads", "head_width")  # whole numbers that divide each other, and from which others follow


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
            `qk_std`, `value_std`, `mlp_std`), each with the values that it takes. Those of whole numbers are rounded,
            sorted, and taken once each; what by default follows from a field follows it.

    Returns:
        The map, with the architecture's own place in it.

    Raises:
        ArchitectureError: for values that no architecture can have.
        TheoryError: for fields that cannot vary, none or more than two of them, one of them twice, or an architecture
            that the map does not speak of.
    """
    _require_fields(vary)
    architecture = architecture_of(subject, batch, context=context, seed=seed)
    _require_spoken_of(architecture)
    taken = {name: _taken(name, values) for name, values in vary.items()}
    axes = [Axis(name, values.astype(float), own_value(architecture, name)) for name, values in taken.items()]
    grids = np.meshgrid(*taken.values(), indexing="ij", sparse=True)
    points = _points(architecture, taken)
    fields: dict[str, Any] = dict(zip(taken, grids, strict=True)) | _following(points, taken)
    found = _found(points.flat[-1], collapsed, fields)
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
    for name in vary:
        if twice := [field for field in SHORTHANDS.get(name, ()) if field in vary]:
            raise TheoryError(f"vary= names {name} and {twice[0]}, which {name} stands for: give one of them.")


def _taken(name: str, values: ArrayLike) -> NDArray[Any]:
    """The values at which points are drawn: of a whole field whole, in their order, each once."""
    array = np.asarray(values)
    if name in SHORTHANDS or not _whole(name):
        return array.astype(np.float64)
    found = np.unique(np.rint(array.astype(np.float64)))
    if len(found) < 2:
        raise TheoryError(f"vary= gives {name}, a whole number, {found[0]:g} alone: give it two of them or more.")
    if name == "mlp_width" and found[0] == 0:
        raise TheoryError("vary= gives mlp_width 0 among others, and no MLP is another block: begin at 1 or more.")
    return found.astype(np.int64)


def _points(architecture: Architecture, taken: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Architectures over the grid, which refuse what none can have, one axis beside the other; the last the largest."""
    # between possible values all are possible, but for numbers that must divide each other: of those all are looked at
    scaled = "logit_scale" not in taken and architecture.logit_scale == float(architecture.head_width or 1) ** -0.5
    follows: dict[str, Any] = {"logit_scale": None} if scaled and "head_width" in taken else {}
    looked_at = [
        values if name in _LINKED else np.array([values.min(), values.max()]) for name, values in taken.items()
    ]
    points = np.empty([len(values) for values in looked_at], dtype=object)
    for place in np.ndindex(*points.shape):
        one = {name: values[at].item() for name, values, at in zip(taken, looked_at, place, strict=True)}
        points[place] = architecture.with_(**one, **follows)
    return points


def _following(points: NDArray[Any], taken: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What follows from widths and heads point by point, as arrays that broadcast."""
    if not taken.keys() & set(_LINKED):
        return {}
    apart = points[tuple(slice(None) if name in _LINKED else slice(1) for name in taken)]
    derived = [name for name in ("head_width", "mlp_width", "logit_scale") if name not in taken]
    values = {name: [getattr(one, name) for one in apart.flat] for name in derived}
    return {name: np.array(found).reshape(apart.shape) for name, found in values.items()}


def _found(architecture: Architecture, collapsed: float, fields: Mapping[str, Any]) -> Phases:
    """The phases; a window that cuts nothing off is none, also beside others that do."""
    found = phases(architecture, collapsed=collapsed, **fields)
    window = fields.get("window", architecture.window)
    if window is None:
        return found
    cuts = np.broadcast_to(np.less(window, fields.get("context", architecture.context)), found.phase.shape)
    if cuts.all():
        return found
    others = {name: values for name, values in fields.items() if name != "window"}
    whole = phases(architecture.with_(window=None), collapsed=collapsed, **others)
    return Phases(
        np.where(cuts, found.phase, whole.phase),
        np.where(cuts, found.similarity, whole.similarity),
        np.where(cuts, found.gauge, whole.gauge),
    )


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
