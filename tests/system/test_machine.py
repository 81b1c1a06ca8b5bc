"""What a process may take of a machine, within the limits of its control groups."""

import os
from pathlib import Path

import pytest

from dinoforge.system import machine

GIB = 2**30
BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system(root: Path, files: dict[str, str]) -> Path:
    """A file system with 16 GiB of memory available, and these files."""
    for name, text in ({"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {16 * 2**20} kB\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_without_control_groups_all_is_there(tmp_path):
    assert machine.free_memory(system(tmp_path, {})) == 16 * GIB
    assert machine.processors(tmp_path) == BOUND


def test_a_group_of_version_2_has_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/cpu.max": "350000 100000",  # of the group around it
            "sys/fs/cgroup/pod/box/memory.max": str(8 * GIB),
            "sys/fs/cgroup/pod/box/memory.current": str(5 * GIB),
            "sys/fs/cgroup/pod/box/memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file 7",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/pod/memory.current": str(6 * GIB),
        },
    )
    assert machine.processors(root) == 4  # 3.5
    assert machine.free_memory(root) == 5 * GIB


def test_a_group_of_version_1_has_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/job",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB}",
        },
    )
    assert machine.processors(root) == 2
    assert machine.free_memory(root) == 2 * GIB


def test_inside_a_container_its_own_group_is_at_the_top(tmp_path):
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/of-the-host",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        },
    )
    assert machine.free_memory(root) == GIB


def test_a_group_without_limits_has_none(tmp_path):
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n1:cpu:/\n2:memory:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
            "sys/fs/cgroup/memory.max": "max",
            "sys/fs/cgroup/memory.current": "0",
        },
    )
    assert machine.free_memory(root) == 16 * GIB
    assert machine.processors(root) == BOUND


def test_a_group_that_is_full_has_nothing_left(tmp_path):
    root = system(
        tmp_path,
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "100", "sys/fs/cgroup/memory.current": "150"},
    )
    assert machine.free_memory(root) == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process cannot be bound to processors here")
def test_of_this_machine():
    assert 1 <= machine.processors() <= BOUND
    free = machine.free_memory()
    assert free is not None
    assert 0 < free < 2**50
