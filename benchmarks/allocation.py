"""Seconds that allocation takes, beside one linear program over the same table solved by HiGHS.

python benchmarks/allocation.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array
from stopwatch import by_turns, machine, ratios

from lightning_caq.allocation.solver.constraint import Constraint, bops_limit, size_limit
from lightning_caq.allocation.solver.frontier import frontier
from lightning_caq.allocation.solver.knapsack import Allocation, smallest, solve
from lightning_caq.report import text_table

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
AVG_BITS = 3.0
INPUT_BITS = 8
KINDS = ("network", "wide", "random")


@dataclass(frozen=True)
class Row:
    """One task at one size.

    Attributes:
        task: What was solved.
        kind: How the tables were made.
        layers: Layers, with eight choices each.
        seconds: Median over all seeds and rounds.
        worst_seconds: The slowest.
        per_linear_program: Median of the time over that of one linear program of HiGHS, in the same round.
        gap: Largest (cost − proven bound) / cost; ``None`` where there is no single cost.
    """

    task: str
    kind: str
    layers: int
    seconds: float
    worst_seconds: float
    per_linear_program: float
    gap: float | None


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with stdout_to_stderr():  # HiGHS has a line of its own to say now and then
        rows = [row for layers in args.layers for kind in args.kinds for row in measure(layers, kind, args)]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(as_text(rows))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--layers", type=int, nargs="+", default=[50, 200, 1000], help="numbers of layers")
    result.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="how tables are made")
    result.add_argument("--seeds", type=int, default=5, help="tables of each kind")
    result.add_argument("--rounds", type=int, default=3, help="rounds of each table")
    result.add_argument("--two-limits", action="store_true", help="size and bit operations at once too")
    result.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    return result


def make_table(layers: int, kind: str, seed: int) -> tuple[NDArray[np.float64], list[int], list[int]]:
    """Costs, weights and multiply–accumulates of a made-up network.

    ``network``: few sizes, as blocks of a network repeat; costs c_i 4^−b, give or take a half. ``wide``: sizes of every
    order of magnitude, the hardest. ``random``: costs that only fall.

    Example:
        >>> costs, weights, macs = make_table(3, "network", 0)
        >>> costs.shape, len(weights), len(macs)
        ((3, 8), 3, 3)
    """
    rng = np.random.default_rng(seed)
    weights = rng.choice([2304, 9216, 36864, 147456, 589824, 2359296], layers)
    if kind == "wide":
        weights = (10 ** rng.uniform(2, 6.5, layers)).astype(np.int64)
    costs = np.multiply.outer(weights * rng.lognormal(0, 2, layers), 0.25 ** np.array(BITS))
    costs *= rng.uniform(0.5, 1.5, costs.shape)
    if kind == "random":
        costs = -np.sort(-rng.uniform(size=costs.shape), axis=1)
    return costs, weights.tolist(), (weights * rng.choice([1, 16, 64, 256], layers)).tolist()


def measure(layers: int, kind: str, args: argparse.Namespace) -> list[Row]:
    """All tasks on tables of one kind and size."""
    say(f"{layers} layers, {kind} ...")
    times: dict[str, list[float]] = {}
    relative: dict[str, list[float]] = {}
    gaps: dict[str, float] = {}
    for seed in range(args.seeds):
        tasks = contestants(*make_table(layers, kind, seed), two_limits=args.two_limits)
        for name, task in tasks.items():
            found = task()
            if isinstance(found, Allocation):
                gaps[name] = max(gaps.get(name, 0.0), (found.cost - found.bound) / found.cost)
        taken = by_turns(tasks, args.rounds)
        for name, ratio in ratios(taken, "linear program").items():
            times.setdefault(name, []).extend(taken[name])
            relative.setdefault(name, []).append(ratio)
    return [
        Row(n, kind, layers, statistics.median(t), max(t), statistics.median(relative[n]), gaps.get(n))
        for n, t in times.items()
    ]


def contestants(
    costs: NDArray[np.float64], weights: list[int], macs: list[int], *, two_limits: bool
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    size = size_limit(weights, BITS, AVG_BITS * sum(weights))
    bops = bops_limit(macs, [INPUT_BITS] * len(macs), BITS, AVG_BITS * INPUT_BITS * sum(macs))
    error = solve(costs, BITS, [size]).cost
    tasks: dict[str, Callable[[], object]] = {
        "linear program": lambda: linear_program(costs, size),
        "optimum under a size": lambda: solve(costs, BITS, [size]),
        "smallest under an error": lambda: smallest(costs, BITS, size.usage, error),
        "frontier": lambda: frontier(costs, size.usage, BITS),
    }
    if two_limits:
        tasks["optimum under size and operations"] = lambda: solve(costs, BITS, [size, bops])
    return tasks


def linear_program(costs: NDArray[np.float64], size: Constraint) -> float:
    """The same problem with mixtures of bit-widths, as one linear program: the yardstick."""
    layers, choices = costs.shape
    columns = np.arange(layers * choices)
    one = csr_array((np.ones(len(columns)), (columns // choices, columns)), shape=(layers, len(columns)))
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(size.usage.ravel()[None] / size.limit, -np.inf, 1)]
    result = milp(costs.ravel() / costs.max(), constraints=limits)
    return float(result.fun)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what compiled code prints to stderr, so that stdout holds the result alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def say(message: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def as_text(rows: Sequence[Row]) -> str:
    """The table, and the machine."""
    cells = [
        [
            row.task,
            row.kind,
            f"{row.layers:,}",
            f"{row.seconds:.3f}",
            f"{row.worst_seconds:.3f}",
            f"{row.per_linear_program:.2f}",
            "" if row.gap is None else f"{row.gap:.0e}",
        ]
        for row in rows
    ]
    header = ["task", "tables", "layers", "seconds", "slowest", "/ linear program", "gap"]
    note = f"Eight choices a layer, {AVG_BITS:g} bits on average. The gap is that to the proven bound.\n{machine()}."
    return f"{text_table(header, cells)}\n\n{note}"


if __name__ == "__main__":
    main()
