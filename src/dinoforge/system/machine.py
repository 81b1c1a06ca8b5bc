"""Processors and main memory that this process may take, within the limits of its control groups."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def processors(root: Path = _ROOT) -> int:
    """The number of processors for this process: those it is bound to, or fewer if its control group has less time.

    Args:
        root: The root of the file system.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _processor_time(root))))


def free_memory(root: Path = _ROOT) -> float | None:
    """Bytes of main memory that this process can still take; None where the system does not say.

    Args:
        root: The root of the file system.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        # Elsewhere than on Linux, at least no more than there is.
        names = getattr(os, "sysconf_names", {})
        known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names) and not sys.platform.startswith("linux")
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if known else None
    available = next((float(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")), math.inf)
    free = min([available, *_left_in_groups(root)])
    return max(free, 0.0) if free < math.inf else None


def _processor_time(root: Path) -> float:
    """Processors' worth of time that control groups allow; infinite without a limit."""
    allowed = math.inf
    for group in _groups("cpu", root):
        words = _words(group / "cpu.max")  # version 2: "max 100000" or "150000 100000"
        if not words:
            words = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] != "max" and float(words[0]) > 0:
            allowed = min(allowed, float(words[0]) / float(words[1]))
    return allowed


def _left_in_groups(root: Path) -> Iterator[float]:
    """Bytes that each control group with a limit has left; files that the system can drop do not count."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    )
    for group in _groups("memory", root):
        for limit, usage, cached in names:
            most, used = _words(group / limit), _words(group / usage)
            if most and used and most[0] != "max":
                stat = _words(group / "memory.stat")
                kept = dict(zip(stat[::2], stat[1::2], strict=False)).get(cached, "0")
                yield float(most[0]) - float(used[0]) + float(kept)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control groups with a controller, and of those around them."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted  # without a name: version 2, which has one tree
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's; then the container's own group is at the top.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top) and folder.is_dir())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # not there, or not for us to read: no limit that is known
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
