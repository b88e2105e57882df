"""Which features of a product end up where: index numbers sent the way that the features went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.lineage import WRITTEN, Node, Ref
from fullrank.capture.products import is_product, product_of

__all__ = ["IDENTITY", "MOVES", "Way", "compact", "numbered"]

_NONE = -1.0
IDENTITY = frozenset(
    {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "data"}
    | {"identity", "cpu", "cuda", "requires_grad_", "alias"}
)
MOVES = frozenset(
    {"view", "reshape", "transpose", "permute", "__getitem__", "chunk", "split", "unbind", "narrow", "select", "expand"}
    | {"repeat", "repeat_interleave", "unsqueeze", "squeeze", "flatten", "unflatten", "roll", "flip", "cat", "concat"}
    | {"concatenate", "stack", "movedim", "swapaxes", "swapdims", "T", "mT", "t", "tensor_split", "hsplit", "vsplit"}
    | {"index_select", "gather", "take_along_dim", "unfold", "moveaxis", "tile", "view_as_complex"}
    | {
        "view_as_real",
        "real",
        "imag",
        "diagonal",
        "as_strided",
        "split_with_sizes",
        "unsafe_chunk",
        "dsplit",
        "H",
        "mH",
    }
)
_SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as"})
_CHANNELS = frozenset({"conv1d", "conv2d", "conv3d"})
_POOLED = frozenset({"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate"})
_REDUCED = frozenset({"mean", "sum", "amax", "amin", "max", "min"})


class _Lost(Exception):  # noqa: N818 - ends a replay, never shown
    """Where the features went cannot be followed."""


def numbered(shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
    """A tensor whose entries are the number of their feature, counted along the given axes; no storage but for those.

    Args:
        shape: of the tensor.
        axes: those that hold features.

    Returns:
        Float32, so that complex views of it exist; exact below 2²⁴.
    """
    sizes = [shape[axis] for axis in axes]
    numbers = torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).reshape(sizes)
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    numbers = numbers.permute(order)
    full = [1] * len(shape)
    for axis in axes:
        full[axis] = shape[axis]
    return numbers.reshape(full).expand(shape)


class Way:
    """Sends the numbers of one tensor's features on through the calls that followed.

    Elementwise steps (rotary embeddings, norms, scales, casts) leave a number where it is; where several numbered
    tensors meet in one, the first that has a number there gives it.

    Args:
        start: whose features are numbered.
        axes: its feature axes.
    """

    def __init__(self, start: Ref, axes: tuple[int, ...]) -> None:
        self._start = start
        self._numbers = numbered(start.shape, axes)

    def to(self, end: Ref) -> Tensor | None:
        """The numbers at another tensor, −1 where another tensor's features are; None where the way is lost."""
        made: dict[tuple[int, int], Tensor | None] = {(self._start.node.order, self._start.index): self._numbers}
        try:
            for node in _between(self._start.node, end.node):
                self._pass(node, made)
            return made.get((end.node.order, end.index))
        except (_Lost, RuntimeError, TypeError, IndexError, ValueError):
            return None

    def _pass(self, node: Node, made: dict[tuple[int, int], Tensor | None]) -> None:
        sources = [ref for ref in node.parents if made.get((ref.node.order, ref.index)) is not None]
        if not sources:
            return

        def look(ref: Ref) -> Tensor:
            found = made.get((ref.node.order, ref.index))
            return torch.full((), _NONE).expand(ref.shape) if found is None else found

        for index, output in enumerate(_replay(node, sources, look)):
            made[node.order, index] = output


def _between(start: Node, end: Node) -> list[Node]:
    """The calls on the ways from one to the other, in order."""
    back: dict[int, Node] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node.order <= start.order or node.order in back:
            continue
        back[node.order] = node
        waiting.extend(ref.node for ref in node.parents)
    return [back[order] for order in sorted(back)]


def _replay(node: Node, sources: list[Ref], look: Callable[[Ref], Tensor]) -> Sequence[Tensor | None]:
    name = node.name
    if product_of(node) is not None or is_product(node) or node.attention:
        raise _Lost
    if name in IDENTITY:
        return [look(sources[0])]
    if name in _SHAPED_LIKE:
        return [
            look(sources[0]).expand(node.shapes[0]) if name == "expand_as" else look(sources[0]).reshape(node.shapes[0])
        ]
    if name in ("view", "reshape") and len(node.shapes) == 1:
        if any(isinstance(value, torch.dtype) for value in node.args[1:]):
            raise _Lost
        return [look(sources[0]).reshape(node.shapes[0])]
    if name in MOVES:
        return _move(node, look)
    if name == "__setitem__":
        base, key, value = node.args
        if not isinstance(value, Ref):
            return [look(base)]
        written = look(base).clone()
        written[_real(key)] = look(value)
        return [written]
    if name == WRITTEN:
        base, value, size, stride, offset = node.args
        written = look(base).contiguous().clone()
        written.as_strided(size, stride, offset).copy_(look(value))
        return [written]
    if name == "glu":
        return [look(sources[0]).narrow(_glu_dim(node), 0, node.shapes[0][_glu_dim(node)])]
    if name == "copy_":
        return [look(node.args[1]).expand(node.shapes[0])] if len(node.args) > 1 else [look(sources[0])]
    if name in _CHANNELS or name in _POOLED:
        numbers = look(sources[0])
        axis = 1 if numbers.ndim > 2 else 0
        first = numbers[(slice(None),) * (axis + 1) + (slice(0, 1),) * (numbers.ndim - axis - 1)]
        return [first.expand(node.shapes[0])]
    if name in _REDUCED:
        return _reduced(node, look(sources[0]))
    if name == "pad":
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
        return [torch.nn.functional.pad(look(sources[0]), sizes, value=_NONE)]
    return [_merged([look(ref) for ref in sources], shape) for shape in node.shapes]


def _reduced(node: Node, numbers: Tensor) -> list[Tensor | None]:
    """Over an axis along which the features do not change (views, tokens) they are what they were."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    if not isinstance(dim, int | tuple | list) or numbers.is_complex():
        return [None]
    highest = numbers.amax(dim, keepdim=keepdim)
    return [highest if torch.equal(highest, numbers.amin(dim, keepdim=keepdim)) else None]


def _glu_dim(node: Node) -> int:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    return int(dim)


def _move(node: Node, look: Callable[[Ref], Tensor]) -> list[Tensor]:
    def arg(value: Any) -> Any:
        if isinstance(value, Ref):
            return look(value) if value.node.floating else _kept(value)
        if isinstance(value, tuple | list):
            return type(value)(arg(item) for item in value)
        return value

    args, kwargs = tuple(map(arg, node.args)), {key: arg(value) for key, value in node.kwargs.items()}
    assert node.function is not None
    output = node.function(*args, **kwargs)
    return list(output) if isinstance(output, tuple | list) else [output]


def _real(value: Any) -> Any:
    if isinstance(value, Ref):
        return _kept(value)
    if isinstance(value, tuple | list):
        return type(value)(_real(item) for item in value)
    return value


def _kept(ref: Ref) -> Tensor:
    if ref.node.kept is None:
        raise _Lost
    return ref.node.kept.cpu()


def _merged(found: list[Tensor], shape: torch.Size) -> Tensor | None:
    merged: Tensor | None = None
    for numbers in found:
        sizes = zip(numbers.shape[::-1], shape[::-1], strict=False)
        if numbers.ndim > len(shape) or any(mine not in (1, full) for mine, full in sizes):
            continue  # a mean, a norm: a statistic of features is none of them
        spread = numbers.expand(shape)
        if merged is None:
            merged = spread
        elif bool((_part(merged) < 0).any()):
            merged = torch.where(_part(merged) < 0, spread, merged)
    return merged


def _part(numbers: Tensor) -> Tensor:
    return numbers.real if numbers.is_complex() else numbers


def compact(numbers: Tensor, *, keep_last: bool = False) -> Tensor:
    """The numbers without the axes along which they do not change."""
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers).flatten(-2)
    for axis in range(numbers.ndim - (2 if keep_last else 1), -1, -1):
        first = numbers.narrow(axis, 0, 1)
        if numbers.shape[axis] > 1 and (numbers.stride(axis) == 0 or bool((numbers == first).all())):
            numbers = first
    return numbers
