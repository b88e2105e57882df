"""Free memory is what every limit leaves."""

import pytest
import torch

from fullrank.diagnosis import free_memory as free_memory_module
from fullrank.diagnosis.free_memory import free_memory

KERNEL = {"/proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 500 kB\n"}
GROUP = {
    "/proc/self/cgroup": "0::/outer/inner\n",
    "/sys/fs/cgroup/outer/inner/memory.max": "max\n",
    "/sys/fs/cgroup/outer/memory.max": "300000\n",
    "/sys/fs/cgroup/outer/memory.current": "250000\n",
    "/sys/fs/cgroup/outer/memory.stat": "anon 200000\ninactive_file 40000\n",
}
FIRST = {
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "8000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [(KERNEL, 512_000), (KERNEL | GROUP, 90_000), (KERNEL | FIRST, 1000), (KERNEL | GROUP | FIRST, 1000)],
)
def test_free_memory_is_the_least_that_the_kernel_and_every_limit_leave(monkeypatch, files, free):
    monkeypatch.setattr(free_memory_module, "_text", lambda file: files.get(str(file), ""))
    assert free_memory(torch.device("cpu")) == free


def test_free_memory_of_this_machine_is_a_number_and_of_others_unknown():
    assert free_memory(torch.device("cpu")) > 2**20
    assert free_memory(torch.device("mps")) is None
