"""Cores: how many are free for this process, and whether torch uses more threads than that."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_SHORTEST = 0.2  # seconds; clocks of the system tick a hundred times a second
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """Clocks at one moment, in seconds.

    Attributes:
        wall: Time of day.
        machine: Processor time that all processes have used.
        process: Processor time that this one has used.
    """

    wall: float
    machine: float
    process: float

    @classmethod
    def now(cls) -> CpuTimes | None:
        """The clocks now; ``None`` where the system does not tell."""
        try:
            user, nice, system, *_ = (float(x) for x in _STAT.read_text(encoding="ascii").split(maxsplit=8)[1:8])
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter(), (user + nice + system) / ticks, time.process_time())


def free_cores(before: CpuTimes | None, after: CpuTimes | None) -> float:
    """Cores that other processes left to this one between two moments; at least one.

    Example:
        >>> free_cores(None, None) == usable_cores()
        True
        >>> busy = usable_cores() + 1
        >>> free_cores(CpuTimes(0, 0, 0), CpuTimes(1, busy, 0))  # others took more than all
        1.0
    """
    cores = usable_cores()
    if before is None or after is None or after.wall - before.wall < _SHORTEST:
        return cores
    others = (after.machine - before.machine) - (after.process - before.process)
    return max(1.0, cores - max(others, 0.0) / (after.wall - before.wall))


def usable_cores() -> float:
    """Cores that this process may use, by its affinity and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return min(cores, max(float(quota) / float(period), 1.0)) if quota != "max" else cores
    except (OSError, ValueError):
        return cores


def crowded(threads: int, free: float) -> str:
    """What to say where there are more threads than free cores; empty where there are not.

    Example:
        >>> crowded(4, 1.6)
        'torch uses 4 threads and about 1.6 cores are free; torch.set_num_threads(1), or OMP_NUM_THREADS=1, ...'
        >>> crowded(2, 1.8)
        ''
    """
    fitting = max(1, int(free))
    if threads <= free + 0.5:
        return ""
    return (
        f"torch uses {threads} threads and about {free:.1f} cores are free; torch.set_num_threads({fitting}), or "
        f"OMP_NUM_THREADS={fitting}, may be faster."
    )
