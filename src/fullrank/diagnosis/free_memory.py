"""How much memory is free on a device: what the kernel and the process's own limits leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["free_memory"]

_CONTROL = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on a device can take.

    CPU: the smaller of what the kernel counts as available and what the limits on the process's control groups leave
    (files that are only cached count as free). CUDA: what the driver has left, and what torch's allocator holds unused.

    Args:
        device: where tensors would lie.

    Returns:
        Bytes; None where nobody can tell.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type != "cpu":
        return None
    known = [size for size in (_available(), *_left_by_limits()) if size is not None]
    return min(known, default=None)


def _available() -> int | None:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _left_by_limits() -> Iterator[int]:
    # version 2: one tree, in which every group above the process's own may hold a limit, too
    own = next((line[3:] for line in _text(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    group = _CONTROL / own.strip().lstrip("/")
    for place in (group, *group.parents):
        if place == _CONTROL or _CONTROL in place.parents:
            yield from _left(place / "memory.max", place / "memory.current", place / "memory.stat", "inactive_file")
    first = _CONTROL / "memory"  # version 1
    yield from _left(
        first / "memory.limit_in_bytes", first / "memory.usage_in_bytes", first / "memory.stat", "total_inactive_file"
    )


def _left(limit: Path, used: Path, stat: Path, cached: str) -> Iterator[int]:
    most, now = _text(limit).strip(), _text(used).strip()
    if most.isdigit() and now.isdigit():
        lines = (line.split() for line in _text(stat).splitlines())
        files = next((int(size) for name, size in lines if name == cached), 0)
        yield max(0, int(most) - int(now) + files)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
