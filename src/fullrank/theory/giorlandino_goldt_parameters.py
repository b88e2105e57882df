"""An architecture's numbers as arrays: some of its fields replaced by values that broadcast against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.architecture.shorthands import SHORTHANDS
from fullrank.errors import TheoryError

__all__ = ["Parameters", "parameters_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameters:
    r"""What the map takes of an architecture, arrays that broadcast, each no larger than it must.

    Attributes:
        architecture: with what does not vary: norm, placement, mask, activation.
        shape: that the varied fields broadcast to; every array has as many axes.
        depth: blocks.
        context: T.
        window: keys seen at most, or None.
        width: d.
        head_width: d_h.
        correlation: ρ₀.
        input_square: mean square of what the first block is given.
        value_gain: $(d\sigma_V^2)(Hd_h\sigma_O^2)$.
        logit_std: of logits between independent tokens of rms 1.
        up_gain: $d\sigma_{up}^2$.
        gate_gain: $d\sigma_{gate}^2$.
        down_gain: $d_{mlp}\sigma_{down}^2$.
        branch: squares of what multiplies the branches of attention and MLP.
        skip: squares of what multiplies the stream past them.
        bias_attention: variance of attention's output bias.
        bias_up: variance of the MLP's first bias.
        bias_mlp: variance of its last.
    """

    architecture: Architecture
    shape: tuple[int, ...]
    depth: Array
    context: Array
    window: Array | None
    width: Array
    head_width: Array
    correlation: Array
    input_square: Array
    value_gain: Array
    logit_std: Array
    up_gain: Array
    gate_gain: Array
    down_gain: Array
    branch: tuple[Array, Array]
    skip: tuple[Array, Array]
    bias_attention: Array
    bias_up: Array
    bias_mlp: Array


def parameters_of(architecture: Architecture, **fields: Any) -> Parameters:
    """Fields as numbers, numbers as arrays.

    Args:
        architecture: whose other fields stand.
        **fields: values or arrays by the name of a numeric field or shorthand; arrays broadcast.

    Returns:
        The parameters.

    Raises:
        TheoryError: for arrays that do not broadcast, or of what is no number.
    """
    single = {name: _plain(value) for name, value in fields.items() if np.ndim(value) == 0}
    base = architecture.with_(**single)
    varied: dict[str, Array] = {}
    for name, value in fields.items():
        if np.ndim(value) == 0:
            continue
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or not array.size:
            raise TheoryError(f"{name}={value!r} cannot vary: an array of numbers can.")
        kind = int if array.dtype.kind in "iu" else float
        for extreme in (array.min(), array.max()):
            base.with_(**{name: kind(extreme)})  # refuses names and values as an architecture does
        for field in SHORTHANDS.get(name, (name,)):
            varied[field] = array.astype(np.float64)
    try:
        shape = np.broadcast_shapes(*(array.shape for array in varied.values()))
    except ValueError as error:
        sizes = ", ".join(f"{name} {array.shape}" for name, array in varied.items())
        raise TheoryError(f"arrays of fields must broadcast: {sizes} do not.") from error
    return _assembled(base, shape, varied)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray | np.generic) else value


def _assembled(base: Architecture, shape: tuple[int, ...], varied: dict[str, Array]) -> Parameters:
    def number(name: str) -> Array:
        array = varied[name] if name in varied else np.asarray(getattr(base, name), dtype=np.float64)
        return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)

    width, heads, head_width, mlp_width = number("width"), number("heads"), number("head_width"), number("mlp_width")
    scale = number("logit_scale")
    if {"width", "heads"} & varied.keys():  # what was derived from them follows them
        if "head_width" not in varied and base.head_width == base.width // base.heads:
            head_width = np.floor(width / heads)
        if "mlp_width" not in varied and base.mlp_width == 4 * base.width:
            mlp_width = 4 * width
    usual_scale = "logit_scale" not in varied and base.logit_scale == float(base.head_width or 1) ** -0.5
    if usual_scale and {"width", "heads", "head_width"} & varied.keys():
        scale = head_width**-0.5
    logit_std = scale * np.sqrt(head_width)
    if not base.qk_norm:
        logit_std = logit_std * width * number("std_q") * number("std_k")
    window = None if base.window is None and "window" not in varied else number("window")
    return Parameters(
        architecture=base,
        shape=shape,
        depth=number("depth"),
        context=number("context"),
        window=window,
        width=width,
        head_width=head_width,
        # of longer contexts the least mean cosine that they can have
        correlation=np.maximum(number("correlation"), -1 / (number("context") - 1)),
        input_square=np.square(number("input_rms")),
        value_gain=width * np.square(number("std_v")) * heads * head_width * np.square(number("std_o")),
        logit_std=np.abs(logit_std),
        up_gain=width * np.square(number("std_up")),
        gate_gain=width * np.square(number("std_gate")),
        down_gain=mlp_width * np.square(number("std_down")),
        branch=(np.square(number("attention_branch")), np.square(number("mlp_branch"))),
        skip=(np.square(number("attention_skip")), np.square(number("mlp_skip"))),
        bias_attention=np.square(number("std_bias_attention")),
        bias_up=np.square(number("std_bias_up")),
        bias_mlp=np.square(number("std_bias_mlp")),
    )
