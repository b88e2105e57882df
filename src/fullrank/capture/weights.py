"""A weight with its role: which numbers of which parameter, and how to read them as one matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fullrank.capture.reference import module_at
from fullrank.errors import CaptureError

__all__ = [
    "Role",
    "Runs",
    "Weight",
    "form_of",
    "indices",
    "matrix",
    "part_of",
    "per_head",
    "runs",
    "shape_of_parameter",
    "unreadable",
]

Role = Literal["q", "k", "v", "o", "up", "gate", "down", "embed", "unembed"]

Runs = tuple[tuple[int, int, int], ...]
"""Index numbers in their order, as (start, stop, step) of each run."""


@dataclass(frozen=True)
class Weight:
    """What plays one role in one block call.

    Read as y = W x, W is (out, in): rows make outputs. Where rotary embeddings, norms, scales or casts follow, they are
    no part of it.

    Attributes:
        role: `q k v o`, of the MLP `up gate down` (the gate is the factor that goes through the nonlinearity), of the
            model `embed unembed`.
        call: the attention call it serves (`self`, `cross`, `self.1`, …); `mlp`, `mlp.1`, … of the MLPs of a block;
            empty for `embed` and `unembed`.
        parameter: name of the parameter (or, where a parametrisation makes it, of the attribute) in the model; empty
            where none was found.
        rows: which rows of the whole parameter, as a matrix; None for all.
        columns: likewise.
        out_axes: axes of the parameter that are rows, without the axis of experts.
        in_axes: axes that are columns.
        expert: which expert of a mixture; None where there is one MLP.
        stacked: whether the experts are slices of one parameter.
        heads: for each attention head of the call the rows of the parameter that make it, for `o` the columns that read
            it; with grouped queries a key head stands once for every query head it serves. Empty where not per head.
        beside: other parameters that add to the same role: low-rank adapters, the rotary part of latent attention.
        direct: of q, k and v, whether it reads the stream (or a norm of it), not what another weight made of it; of o,
            whether it reads what the kernel returned, with no gate or norm in between.
        reason: why it is not known, or cannot be read as a matrix; empty where it can.
    """

    role: Role
    call: str = ""
    parameter: str = ""
    rows: Runs | None = None
    columns: Runs | None = None
    out_axes: tuple[int, ...] = (0,)
    in_axes: tuple[int, ...] = (1,)
    expert: int | None = None
    stacked: bool = False
    heads: tuple[Runs, ...] = ()
    beside: tuple[str, ...] = ()
    direct: bool = True
    reason: str = ""

    @property
    def part(self) -> str:
        """The role as it stands in a table: `q`, `cross.q`, `self.1.q`, `up`, `up.1`, `expert.up`."""
        place: str = self.role
        if self.call.startswith("mlp."):
            place = f"{self.role}.{self.call[4:]}"
        elif self.call not in ("", "self", "mlp"):
            place = f"{self.call}.{self.role}"
        return place if self.expert is None else f"expert.{place}"

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored as (in, out)."""
        return bool(self.out_axes) and bool(self.in_axes) and self.out_axes[0] > self.in_axes[0]


def runs(numbers: Iterable[int]) -> Runs:
    """Index numbers as runs of constant step.

    Returns:
        The fewest runs that a walk from the left finds.
    """
    found: list[tuple[int, int, int]] = []
    start = last = step = None
    for number in numbers:
        if last is None:
            start = last = number
        elif step is None and number > last:
            step, last = number - last, number
        elif step is not None and number == last + step:
            last = number
        else:
            found.append((cast(int, start), last + 1, step or 1))
            start, last, step = number, number, None
    if last is not None:
        found.append((cast(int, start), last + 1, step or 1))
    return tuple(found)


def indices(chosen: Runs) -> list[int]:
    """The index numbers of runs."""
    return [number for start, stop, step in chosen for number in range(start, stop, step)]


def matrix(model: nn.Module, weight: Weight) -> Tensor:
    """The weight as a matrix (out, in), in the dtype of the parameter, detached.

    Parameters that are offloaded (accelerate) are fetched, sharded ones gathered: then every process must ask for the
    same weights in the same order.

    Args:
        model: the model that was surveyed.
        weight: one of its roles.

    Returns:
        The rows and columns that play the role; a view of the parameter where these are one run.

    Raises:
        CaptureError: where the role is not known or is no floating matrix.
    """
    reason = unreadable(model, weight)
    if reason:
        raise CaptureError(f"weight {weight.part!r} of this {type(model).__name__} cannot be read: {reason}.")
    whole = _whole(model, weight)
    return _chosen(_chosen(whole, weight.rows, 0), weight.columns, 1)


def per_head(model: nn.Module, weight: Weight) -> list[Tensor]:
    """The matrix of every attention head: rows of q, k and v, columns of o.

    Args:
        model: the model that was surveyed.
        weight: one of its roles.

    Returns:
        One (head width, in) per head, for `o` one (out, head width); none where the role has no heads.

    Raises:
        CaptureError: as `matrix`.
    """
    reason = unreadable(model, weight)
    if reason:
        raise CaptureError(f"weight {weight.part!r} of this {type(model).__name__} cannot be read: {reason}.")
    whole = _whole(model, weight)
    if weight.role == "o":
        return [_chosen(_chosen(whole, weight.rows, 0), head, 1) for head in weight.heads]
    return [_chosen(_chosen(whole, weight.columns, 1), head, 0) for head in weight.heads]


def unreadable(model: nn.Module, weight: Weight) -> str:
    """Why a weight is no matrix of floating numbers; empty where it is one."""
    if weight.reason:
        return weight.reason
    module, name = _owner(model, weight.parameter)
    held = _held(module, name)
    if held is None:
        return f"the model has no parameter {weight.parameter!r} any more"
    return _quantised(held)


def shape_of_parameter(model: nn.Module, weight: Weight) -> tuple[int, ...]:
    """The shape of the whole parameter; empty where the model has none of that name."""
    held = _held(*_owner(model, weight.parameter))
    return () if held is None else tuple(held.shape)


def form_of(held: Tensor) -> str:
    """The dtype or the class that holds a weight otherwise than as plain floating numbers; else empty."""
    kind = type(held.data)
    if kind not in (Tensor, nn.Parameter) and not hasattr(held, "full_tensor"):
        return kind.__name__
    plain = held.is_floating_point() and held.dtype.itemsize > 1
    return "" if plain else str(held.dtype).removeprefix("torch.")


def _quantised(held: Tensor) -> str:
    form = form_of(held)
    if not form:
        return ""
    if not held.is_floating_point():
        return f"it is quantised to {form}"
    return f"it is stored as {form}, with scales kept apart" if held.dtype.itemsize < 2 else f"it is held as {form}"


def part_of(tensor: Tensor, weight: Weight) -> Tensor:
    """What plays the role, of a tensor that is laid out as the whole parameter, such as its gradient.

    Args:
        tensor: of the parameter's shape.
        weight: one of its roles.

    Returns:
        (out, in); a view where the rows and columns are one run.
    """
    return _chosen(_chosen(_as_matrix(tensor, weight), weight.rows, 0), weight.columns, 1)


def _whole(model: nn.Module, weight: Weight) -> Tensor:
    return _as_matrix(_fetched(model, weight.parameter), weight)


def _as_matrix(tensor: Tensor, weight: Weight) -> Tensor:
    if weight.expert is not None and weight.stacked:
        tensor = tensor[weight.expert]
    rows = torch.Size(tensor.shape[axis] for axis in weight.out_axes).numel()
    return tensor.permute(*weight.out_axes, *weight.in_axes).reshape(rows, -1)


def _fetched(model: nn.Module, parameter: str) -> Tensor:
    module, name = _owner(model, parameter)
    held = _held(module, name)
    if held is not None and held.is_meta and hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device  # offloaded: it was accelerate that took it away

        with align_module_device(module):
            held = _held(module, name)
            assert held is not None
            return held.detach().clone()
    assert held is not None
    with torch.no_grad():
        held = held.detach()
        full = getattr(held, "full_tensor", None)
        return full() if full is not None else held


def _held(module: nn.Module | None, name: str) -> Tensor | None:
    with torch.no_grad():
        held: Any = None if module is None else getattr(module, name, None)
    return held if isinstance(held, Tensor) else None


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module | None, str]:
    path, _, name = parameter.rpartition(".")
    return module_at(model, path), name


def _chosen(whole: Tensor, which: Runs | None, axis: int) -> Tensor:
    if which is None:
        return whole
    if len(which) == 1:
        start, stop, step = which[0]
        return whole[start:stop:step] if axis == 0 else whole[:, start:stop:step]
    return whole.index_select(axis, torch.tensor(indices(which), device=whole.device))
