"""Timing by turns: each contestant runs once a round, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(work: Callable[[], object]) -> float:
    """Time that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one round that does not count.

    Example:
        >>> times = by_turns({"fast": lambda: None, "slow": lambda: time.sleep(0.01)}, rounds=3)
        >>> len(times["fast"]), min(times["slow"]) > max(times["fast"])
        (3, True)
    """
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work))
    return times


def ratios(times: Mapping[str, list[float]], unit: str) -> dict[str, float]:
    """Median over the rounds of each contestant's time over that of ``unit`` in the same round.

    Example:
        >>> ratios({"gradient": [1.0, 2.0, 1.0], "product": [2.0, 4.0, 9.0]}, "gradient")["product"]
        2.0
    """
    return {
        name: statistics.median(a / b for a, b in zip(each, times[unit], strict=True)) for name, each in times.items()
    }


def machine() -> str:
    """The processor, its cores, torch's threads and torch's version, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} torch thread{'s' * (threads > 1)}, torch {torch.__version__}"
