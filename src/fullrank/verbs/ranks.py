"""Several processes that examine one model together, each on its own part of the batch."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fullrank import errors
from fullrank.capture.events import Event, Observer, Signal
from fullrank.capture.wrappers import is_sharded
from fullrank.errors import BatchError, FullrankError, ModelError
from fullrank.table import Row

__all__ = ["Attempt", "Ranks", "ranks_of"]

T = TypeVar("T")


class Ranks:
    """The processes that examine one model, or this one alone.

    Every process calls every method in the same order: each is one exchange of Python objects, over the process group
    of the model. Nothing is exchanged where there is one process.

    Args:
        group: the process group; None for one process.
        sharded: whether forwards of the model are exchanges too, so that none may end early.
    """

    def __init__(self, group: Any = None, *, sharded: bool = False) -> None:
        self.group = group
        self.sharded = sharded

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.group is not None

    def gathered(self, value: T) -> list[T]:
        """What each process passed, in the order of their ranks, with its tensors on the CPU."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        packed = io.BytesIO()
        torch.save(value, packed)
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, packed.getvalue(), group=self.group)
        # objects of these very processes, made by the lines above
        return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=False) for one in every]

    def agree(self, work: Callable[[], T]) -> T:
        """Do something that may fail here and not elsewhere; where it fails anywhere, it fails everywhere.

        Args:
            work: exchanges nothing, or the same on every process.

        Returns:
            What `work` returned here.

        Raises:
            FullrankError: of the class raised elsewhere, naming the rank; an error of this process as it is.
        """
        result: T
        fault: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.group is None:
                raise
            fault = error  # raised again below, after the others have heard of it
        if self.group is not None:
            self._raise_first(fault)
        return result

    def _raise_first(self, fault: Exception | None) -> None:
        said = None if fault is None else (type(fault).__name__, str(fault))
        for rank, answer in enumerate(self.gathered(said)):
            if fault is not None:
                raise fault
            if answer is not None:
                kind = getattr(errors, answer[0], None)
                of = kind if isinstance(kind, type) and issubclass(kind, FullrankError) else ModelError
                raise of(f"process {rank} could not examine its part of the batch: {answer[1] or answer[0]}")

    def same(self, value: Any, complaint: str) -> None:
        """Refuse what differs between the processes.

        Args:
            value: compares with `==`.
            complaint: a sentence.

        Raises:
            BatchError: with the complaint.
        """
        every = self.gathered(value)
        if any(one != every[0] for one in every):
            raise BatchError(complaint)

    def before(self, count: int) -> int:
        """How many the processes before this one have together, where this one has `count`."""
        if self.group is None:
            return 0
        import torch.distributed as dist

        return sum(self.gathered(count)[: dist.get_rank(self.group)])

    def merged(self, observers: Sequence[Observer]) -> list[Observer]:
        """The observers with what those of all processes have seen, the same on each process."""
        first, *others = self.gathered(list(observers))
        for theirs in others:
            for mine, other in zip(first, theirs, strict=True):
                mine.merge(other)
        return first


class Attempt:
    """An observer that may fail without ending the forward: other processes wait for it to go on.

    Args:
        observer: fed until it, or another that shares `faults`, has failed.
        faults: takes what was raised, to be raised after the forward by whoever holds it.
    """

    def __init__(self, observer: Observer, faults: list[Exception]) -> None:
        self.needs: frozenset[Signal] = observer.needs
        self._observer = observer
        self._faults = faults

    def see(self, event: Event) -> None:
        """Hand on an event, unless something has failed."""
        if self._faults:
            return
        try:
            self._observer.see(event)
        except Exception as fault:  # noqa: BLE001 - kept, and raised later
            self._faults.append(fault)

    def rows(self) -> list[Row]:
        """None: the rows are the observer's own."""
        return []

    def merge(self, other: Attempt) -> None:
        """Nothing: what has been seen is the observer's own."""


def ranks_of(model: nn.Module) -> Ranks:
    """The processes that hold copies or parts of a model.

    Args:
        model: as it was passed, with the wrappers that tell how it is distributed.

    Returns:
        Those of its process group where the model is distributed (`DistributedDataParallel`, `fully_shard`,
        `FullyShardedDataParallel`), else this one alone: a plain model in a distributed job is this process's own.

    Raises:
        ModelError: for a tensor-parallel model, whose heads are spread over processes.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return Ranks()
    copies = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    sharded = is_sharded(model)
    meshes = [_mesh(parameter) for parameter in model.parameters()]
    spread = [mesh for mesh in meshes if mesh is not None]
    if spread and (not sharded or any(shards > 1 for _, shards in spread)):
        raise ModelError(
            f"{type(model).__name__} is tensor-parallel: each process holds some of its heads; examine it unsharded, "
            "or sharded by fully_shard alone."
        )
    if not copies and not sharded:
        return Ranks()
    group = copies[0].process_group if copies else _group_of(spread[0][0]) if spread else dist.group.WORLD
    return Ranks(group if dist.get_world_size(group) > 1 else None, sharded=sharded)


def _mesh(parameter: Tensor) -> tuple[Any, int] | None:
    """The device mesh that a parameter is spread over, and over how many of its axes it is cut."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    placements: Any = getattr(parameter, "placements", ())
    return mesh, sum(placement.is_shard() for placement in placements)


def _group_of(mesh: Any) -> Any:
    import torch.distributed as dist

    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD  # replicas of shards are all the processes
