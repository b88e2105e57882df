r"""DeepScaleLM (arXiv 2403.09635): moments from block to block, and of gradients back again, component by component.

**Assumes** what `deepscalelm` does, a block of attention and a ReLU MLP, post- or pre-norm or none. A residual adds
moments, $q \leftarrow \lambda^2q + \beta^2q_F$ and alike for p, gradients too; a norm divides by q, its slope by q as
well. Gradients begin at the last state, independent between tokens: their scale is the loss's and is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.activations import arc_cosine
from fullrank.theory.assumption import Assumption
from fullrank.theory.courses import stream_rows
from fullrank.theory.deepscalelm import relu_backward_correlation
from fullrank.theory.deepscalelm_attention import (
    attention_backward,
    attention_backward_covariance,
    attention_covariance,
    attention_variance,
)
from fullrank.theory.giorlandino_goldt_map import UNBOUNDED
from fullrank.theory.giorlandino_goldt_parameters import Parameters, parameters_of
from fullrank.theory.mean_field import MANY_TOKENS, WIDE_HEADS, WIDE_STREAM
from fullrank.theory.theory import theory

__all__ = ["DEEPSCALELM", "Moments", "backward", "forward"]

Array = NDArray[np.float64]


class Moments(NamedTuple):
    """Mean square of entries of one token, and mean product of those of two: of a state, or of its gradient."""

    square: Array
    product: Array

    @property
    def correlation(self) -> Array:
        """The product over the square; 0 where there is nothing."""
        return np.divide(self.product, self.square, out=np.zeros_like(self.product), where=self.square > 0)


def forward(architecture: Architecture, **fields: Any) -> list[Moments]:
    """Moments of the stream before the first block and after every block.

    Args:
        architecture: with a ReLU MLP, or none.
        **fields: arrays in place of numeric fields but `depth`, by name or shorthand; they broadcast.

    Returns:
        depth + 1 moments.
    """
    one = parameters_of(architecture, **fields)
    return _states(one, _blocks(one))


def backward(architecture: Architecture, **fields: Any) -> list[Moments]:
    """Moments of the gradient at the same states, in units of those at the last, independent between tokens there.

    Args:
        architecture: with a ReLU MLP, or none.
        **fields: as `forward` takes them.

    Returns:
        depth + 1 moments, the last (1, 0).
    """
    one = parameters_of(architecture, **fields)
    return _gradients(one, _blocks(one))


def _states(one: Parameters, blocks: list[_Block]) -> list[Moments]:
    return [_start(one), *(block.after for block in blocks)]


def _gradients(one: Parameters, blocks: list[_Block]) -> list[Moments]:
    found = [Moments(np.ones(one.shape), np.zeros(one.shape))]
    for block in reversed(blocks):
        found.append(_back(one, block, found[-1]))
    return found[::-1]


# ------------------------------------------------------------ one block


@dataclass(frozen=True)
class _Block:
    """States of a block: before it, what attention reads, the sum after attention, what the MLP reads, the last sum."""

    before: Moments
    first_read: Moments
    first_sum: Moments
    middle: Moments
    second_read: Moments
    second_sum: Moments
    after: Moments


def _blocks(one: Parameters) -> list[_Block]:
    state, blocks = _start(one), []
    for _ in range(one.architecture.depth):
        blocks.append(_block(one, state))
        state = blocks[-1].after
    return blocks


def _start(one: Parameters) -> Moments:
    q = one.input_square + np.zeros(one.shape)
    return Moments(q, q * one.correlation)


def _normed(state: Moments) -> Moments:
    return Moments(np.ones_like(state.square), state.correlation)


def _read(one: Parameters, state: Moments) -> Moments:
    return _normed(state) if one.architecture.placement == "pre" else state


def _kept(one: Parameters, state: Moments) -> Moments:
    return _normed(state) if one.architecture.placement == "post" else _held(state)


def _held(state: Moments) -> Moments:
    """Far beyond what a model computes with moments stay as they are, in proportion."""
    share = np.minimum(1.0, UNBOUNDED / np.maximum(state.square, 1.0))
    return Moments(state.square * share, state.product * share)


def _logits(one: Parameters, read: Moments) -> Array:
    return one.logit_std * (1 if one.architecture.qk_norm else read.square)


def _block(one: Parameters, before: Moments) -> _Block:
    (skip_a, skip_m), (b_a, b_m) = one.skip, one.branch
    first = _read(one, before)
    sizes: dict[str, Any] = {
        "tokens": one.context,
        "logit_std": _logits(one, first),
        "size": first.square,
        "gain": one.value_gain,
        "width": one.width,
    }
    q = attention_variance(first.correlation, **sizes) + one.bias_attention
    p = attention_covariance(first.correlation, **sizes) + one.bias_attention
    first_sum = Moments(skip_a * before.square + b_a * q, skip_a * before.product + b_a * p)
    middle = _kept(one, first_sum)
    if not one.architecture.mlp_width:
        return _Block(before, first, first_sum, middle, middle, middle, middle)
    second = _read(one, middle)
    unit = _hidden(one, second)
    q = one.down_gain * unit.square / 2 + one.bias_mlp
    p = one.down_gain * unit.square * arc_cosine(unit.correlation) / 2 + one.bias_mlp
    second_sum = Moments(skip_m * middle.square + b_m * q, skip_m * middle.product + b_m * p)
    return _Block(before, first, first_sum, middle, second, second_sum, _kept(one, second_sum))


def _hidden(one: Parameters, read: Moments) -> Moments:
    """Of the pre-activations."""
    return Moments(one.up_gain * read.square + one.bias_up, one.up_gain * read.product + one.bias_up)


def _back(one: Parameters, block: _Block, gradient: Moments) -> Moments:
    (skip_a, skip_m), (b_a, b_m) = one.skip, one.branch
    if one.architecture.mlp_width:
        gradient = _through_norm(one, "post", block.second_sum, gradient)
        gain = one.down_gain * one.up_gain / 2
        r_g = relu_backward_correlation(
            _hidden(one, block.second_read).correlation, gradient_correlation=gradient.correlation
        )
        branch = Moments(gain * gradient.square, gain * gradient.square * r_g)
        branch = _through_norm(one, "pre", block.middle, branch)
        gradient = Moments(*(skip_m * g + b_m * f for g, f in zip(gradient, branch, strict=True)))
    gradient = _through_norm(one, "post", block.first_sum, gradient)
    read, r_g = block.first_read, gradient.correlation
    shared: dict[str, Any] = {"gradient_correlation": r_g, "tokens": one.context, "gain": one.value_gain}
    s = _logits(one, read)
    square = attention_backward(gradient.square, correlation=read.correlation, logit_std=s, width=one.width, **shared)
    branch = Moments(square, attention_backward_covariance(gradient.square, **shared))
    branch = _through_norm(one, "pre", block.before, branch)
    return _held(Moments(*(skip_a * g + b_a * f for g, f in zip(gradient, branch, strict=True))))


def _through_norm(one: Parameters, placement: str, read: Moments, gradient: Moments) -> Moments:
    if one.architecture.placement != placement:
        return gradient
    return Moments(gradient.square / read.square, gradient.product / read.square)


# ------------------------------------------------------------ of an architecture


def _small(architecture: Architecture) -> float:
    """The exponential over its mean needs (1 − r) s² well below log T."""
    read = 1.0
    if architecture.placement != "pre" and not architecture.qk_norm:  # without a norm logits grow with the stream
        read = max(float(one.square) for one in forward(architecture)[:-1])
    x = (1 - max(0.0, architecture.correlation)) * (architecture.logit_std * read) ** 2
    share = x / math.log(architecture.context)
    return math.exp(-2 * share) if share < 1.5 else 0.0


def _relu(architecture: Architecture) -> float:
    return float(architecture.mlp_width == 0 or (architecture.activation == "relu" and not architecture.gated))


_ASSUMES = (
    Assumption("the MLP is one hidden layer of ReLU", _relu, "its MLP has {activation} units (gated: {gated})"),
    Assumption(
        "logits are small", _small, "its logits are too large at initialisation for an exponential over its mean"
    ),
    Assumption(
        "every token sees all",
        lambda one: float(one.mask == "full" and (one.window is None or one.window >= one.context)),
        "its mask is {mask}, its window {window}",
    ),
    Assumption(
        "norms stand before branches or after sums",
        lambda one: {"pre": 1.0, "post": 1.0, "none": 0.7}.get(one.placement, 0.0) * (one.norm != "batchnorm"),
        "its norm is {norm}, {placement}",
    ),
    Assumption("attention comes before the MLP", lambda one: float(not one.parallel), "its branches are parallel"),
    Assumption("logits are not capped", lambda one: float(one.softcap is None), "its logits are capped at {softcap}"),
    Assumption(
        "logits depend on positions through tokens alone",
        lambda one: {"alibi": 0.5, "relative": 0.7}.get(one.positions, 1.0),
        "its positions are {positions}",
    ),
    MANY_TOKENS,
    WIDE_STREAM,
    WIDE_HEADS,
)


@theory(
    "deepscalelm",
    title="moments component by component (arXiv 2403.09635)",
    assumes=_ASSUMES,
    gives=("similarity", "residual", "rms", "gradient_gain"),
)
def DEEPSCALELM(architecture: Architecture) -> Sequence[Row]:  # noqa: N802 - it becomes a Theory, a constant
    """Rows of the stream, and of `gradient_gain`, gradients over those of the last state.

    `gradient_rms` is in units of the loss, which no theory of the stack knows.

    Args:
        architecture: of which.

    Returns:
        Rows, layer by layer.
    """
    one = parameters_of(architecture)
    blocks = _blocks(one)
    states = _states(one, blocks)
    rho = np.array([float(state.correlation) for state in states])
    squares = np.array([float(state.square) for state in states])
    gains = [math.sqrt(float(gradient.square)) for gradient in _gradients(one, blocks)]
    return stream_rows("deepscalelm", architecture, rho, mean_square=squares) + [
        Row(
            architecture.stack,
            layer,
            "gradient",
            "out",
            "gradient_gain",
            gain,
            scope="all",
            n=None,
            exact=False,
            source="theory:deepscalelm",
        )
        for layer, gain in enumerate(gains)
        if gain < math.sqrt(UNBOUNDED) / 2
    ]
