"""Whether what lies between two tensors is a norm, and which: told from what it makes of random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.products import is_product, product_of
from fullrank.capture.replay import CannotReplay, Replay, between
from fullrank.capture.upstream import CARRIED
from fullrank.capture.ways import MOVES
from fullrank.measure.token_map import token_map

__all__ = ["NORMS", "Kind", "Unseen", "awake", "kind_between"]

Kind = Literal["layer", "rms", "batch", "other"]
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "native_layer_norm"})
"""Functions that are norms."""

_KINDS: dict[str, Kind] = {"layernorm": "layer", "rmsnorm": "rms", "batchnorm": "batch"}
_LARGE = 64.0
_TIMES = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})


class Unseen(Exception):  # noqa: N818 - a reason on its way to a sentence, never shown as an error
    """What comes out is the same whatever goes in, and there is more between than a factor: it may be a norm."""


def awake(parameter: Tensor) -> Tensor:
    """Ones for a parameter that is 0 throughout, as gains are at first in some models: what it multiplies is seen."""
    return parameter if bool(parameter.any()) else torch.ones_like(parameter)


def kind_between(
    replays: Sequence[Replay], start: Ref, end: Ref, *, dtype: torch.dtype, device: torch.device
) -> tuple[Kind, float] | None:
    """Which norm a tensor is of another one.

    Args:
        replays: of the forward's calls; the next one is asked where what comes out of the one before is constant.
        start: the tensor that may be normalised.
        end: what became of it.
        dtype: of the weights.
        device: of the weights.

    Returns:
        The kind and the ε that is added to the mean square (NaN where it cannot be told); None where it is no norm.
        `other` is what does not change when tokens are three times as large, and is neither of the formulas.

    Raises:
        Unseen: where it is constant in all of them.
    """
    calls = between({start: None}, end)
    if start.shape.numel() != end.shape.numel() or not any(_acts(node) for node in calls):
        return None
    if any(node.attention or is_product(node) or product_of(node) is not None for node in calls):
        return None
    for node in calls:
        if node.name == "batch_norm":
            found = node.kwargs.get("eps", node.args[7] if len(node.args) > 7 else math.nan)
            return "batch", float(found)
    for replay in replays:

        def run(z: Tensor, replay: Replay = replay) -> Tensor:
            return replay(end, {start: z.to(device)}).cpu()

        try:
            made = token_map(run, start.shape, dtype=dtype)
        except CannotReplay:
            return ("other", math.nan) if any(node.name in NORMS for node in calls) else None
        if made.kind in _KINDS:
            return _KINDS[made.kind], _epsilon(run, start.shape, dtype, centred=made.kind == "layernorm")
        if made.peak != 0:
            return ("other", math.nan) if made.degree == 0 else None
    if all(node.name in _TIMES or not _acts(node) for node in calls):
        return None
    raise Unseen


def _acts(node: Node) -> bool:
    return node.name not in CARRIED and node.name not in MOVES


def _epsilon(run: Callable[[Tensor], Tensor], like: torch.Size, dtype: torch.dtype, *, centred: bool) -> float:
    """ε of y = γ z / √(rms² + ε) + β, from how much smaller tokens become that are small themselves."""
    z = torch.randn(like, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(-1, keepdim=True) if centred else z
    z = z / z.square().mean(-1, keepdim=True).sqrt()

    def size(factor: float) -> float:
        made = run((factor * z).to(dtype)).double() - zero
        return float(made.square().mean().sqrt())

    zero = run(torch.zeros(like, dtype=dtype)).double()
    large = size(_LARGE)
    for power in range(1, 9):
        c = 10.0**-power
        small = size(c)
        if small == 0:
            return math.nan
        share = (large / small) ** 2 - 1  # ε / c²
        if share > 0.5:
            return float(f"{c**2 * share:.3g}")
    return 0.0
