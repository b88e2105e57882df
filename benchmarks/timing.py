"""How the benchmarks measure: all sides in one run, in turns, medians; memory at hand; and what they ran on."""

import os
import platform
import statistics
import time
from pathlib import Path


def paired(sides, *, rounds=7):
    """Median seconds of each side. Sides take turns, so that a disturbance of the machine meets all of them.

    Args:
        sides: name → function without arguments.
        rounds: how often each is timed, after one call that is not.

    Returns:
        name → seconds.
    """
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def now_mib():
    """The process's resident memory now; that of the libraries included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def header(**facts):
    """One line that says what a table was measured on: processor, threads, versions, and further facts."""
    import torch

    parts = [
        _processor(),
        f"{torch.get_num_threads()} threads",
        f"python {platform.python_version()}",
        f"torch {torch.__version__.partition('+')[0]}",
        *(f"{name} {value}" for name, value in facts.items()),
    ]
    return ", ".join(parts)


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wide = "AVX-512" if "avx512f" in fields.get("flags", "") else "AVX2" if "avx2" in fields.get("flags", "") else ""
    return f"{fields.get('model name', platform.machine())} {wide}".strip()
