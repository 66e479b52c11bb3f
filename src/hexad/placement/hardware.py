"""What this process may use of the machine: CPUs, memory, and the rates the native core measures.

Containers are believed: on Linux the CPU affinity and the cgroup's quota and memory limit (v2 and v1)
bound what the machine has. Elsewhere, and where a file is missing or unreadable, the operating system's
own figures stand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Hardware:
    """cpus: threads that can run at once. free_bytes: memory that can still be taken.

    isa: the instruction set the native core runs on. bandwidth: bytes per second read from memory by all
    cpus. int8_rate: int8 multiply-adds per second of all cpus. None where not probed.
    """

    cpus: int
    free_bytes: int
    isa: str | None = None
    bandwidth: float | None = None
    int8_rate: float | None = None


def probe(threads: int | None = None, *, rates: bool = False) -> Hardware:
    """Looks at the machine. rates: also measure bandwidth and int8 rate with `threads` threads (default:
    cpus), which takes a moment."""
    cpus = cpu_count()
    if not rates:
        return Hardware(cpus, free_memory())
    from hexad import _native

    threads = threads or cpus
    return Hardware(
        cpus,
        free_memory(),
        isa=_native.isa(),
        bandwidth=_native.probe_bandwidth(threads),
        int8_rate=_native.probe_int8(threads),
    )


def cpu_count(root: Path = _ROOT) -> int:
    """CPUs in this process's affinity, or fewer if the cgroup's quota is lower (rounded up); at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quotas = []
    for group in _cgroups(root, "cpu"):
        v2 = _read(group / "cpu.max").split()
        if len(v2) == 2:
            quotas.append((_number(v2[0]), _number(v2[1])))
        quotas.append(
            (_number(_read(group / "cpu.cfs_quota_us")), _number(_read(group / "cpu.cfs_period_us")))
        )
    for quota, period in quotas:
        if quota is not None and period:
            cpus = min(cpus, math.ceil(quota / period))
    return max(cpus, 1)


def thread_cpus(threads: int, root: Path = _ROOT) -> list[list[int]]:
    """For each of so many threads, the CPUs it should stay on: those of one memory node, so that what it was
    the first to touch stays near it. Neighbouring threads share a node as long as it has CPUs for them.

    Empty where all CPUs of this process's affinity belong to one node, and where the system does not tell:
    then the scheduler knows better.
    """
    allowed = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()
    nodes = sorted(
        (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: _number(path.name[4:]) or 0
    )
    of_nodes = [sorted(allowed & _cpu_list(_read(node / "cpulist"))) for node in nodes]
    places = [cpus for cpus in of_nodes for _ in cpus]
    if sum(map(bool, of_nodes)) < 2:
        return []
    return [places[thread * len(places) // threads] for thread in range(threads)]


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that can be taken without swapping: the kernel's MemAvailable, or less if a cgroup's limit is
    nearer.

    Page cache charged to the cgroup (a mapped model file, say) can be reclaimed and counts as free.
    """
    free = _system_memory(root)
    for group in _cgroups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(_read(group / limit_file)), _number(_read(group / usage_file))
            if limit is not None and usage is not None:
                free = min(free, max(limit - usage + _page_cache(group), 0))
    return free


def _system_memory(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        kib = _number(value.removesuffix("kB"))
        if key == "MemAvailable" and kib is not None:
            return kib * 1024
    # Not Linux. Where the free pages are unknown too, half of all memory is a careful guess.
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        if name in getattr(os, "sysconf_names", {}):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return 2**63 - 1


def _page_cache(group: Path) -> int:
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    prefix = (
        "total_" if "total_inactive_file" in stat else ""
    )  # v1: "total_" includes child groups, as usage does
    return sum(_number(stat.get(f"{prefix}{lru}_file", "")) or 0 for lru in ("active", "inactive"))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup for a controller and all its parents, v2 and v1: the tightest limit counts."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        group = base / path.lstrip("/")
        # In a container the path may be the host's, with only the base mounted; missing files read as empty.
        while group != base and base in group.parents:
            yield group
            group = group.parent
        yield base


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _cpu_list(text: str) -> set[int]:
    """CPUs of the kernel's lists ("0-3,8"); what is none of their parts does not count."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        low, high = _number(first), _number(last if dash else first)
        if low is not None and high is not None:
            cpus |= set(range(low, high + 1))
    return cpus


def _number(text: str) -> int | None:
    """A non-negative integer; None for anything else ("max", −1, nothing)."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None
