"""Which figure on the samples held out tells which of several networks of one size is best on test images.

python benchmarks/judges.py --model resnet20 --avg-bits 2.25
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from methods import Bench, load, progress
from networks import BLOCKS, DATA, accuracy
from scipy.stats import spearmanr
from small_networks import SMALL

from lightning_caq.allocation.budget import AvgBits
from lightning_caq.allocation.methods import available_methods
from lightning_caq.errors import CAQError
from lightning_caq.network.batches import split_samples
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.objective import make_objective
from lightning_caq.options import CHOICES
from lightning_caq.report import text_table
from lightning_caq.selection.candidate import prepare_candidates
from lightning_caq.utilities.isolation import preserved

METHODS = (
    "cet",
    "cet_expected",
    "mckp",
    "caq",
    "zeroq",
    "hawq_v2",
    "hessian_diagonal",
    "gradient_norm",
    "uniform",
)
JUDGES = ("held_divergence", "held_error")
TRUTHS = ("test_divergence", "test_error", "accuracy")


@dataclass(frozen=True)
class Row:
    """One allocation, rounded and repaired.

    Attributes:
        model: The network.
        method: How bits were allocated.
        avg_bits: The budget.
        seed: Seed of the calibration images.
        held_divergence: Divergence from the float outputs on the samples held out, nat.
        held_error: Output error on them, a part of the output: what the guard and repairs go by.
        test_divergence: Divergence on the test images, nat.
        test_error: Output error on them.
        accuracy: On them, percent.
    """

    model: str
    method: str
    avg_bits: float
    seed: int
    held_divergence: float
    held_error: float
    test_divergence: float
    test_error: float
    accuracy: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        rows = [row for seed in args.seeds for row in run(args, seed)]
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"judges.py: {error}")
    command = shlex.join(["python", "benchmarks/judges.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", choices=(*BLOCKS, *SMALL), default="resnet20")
    result.add_argument("--avg-bits", type=float, default=2.25)
    result.add_argument("--rounding", choices=CHOICES["rounding"][:2], default="error_feedback")
    result.add_argument("--methods", nargs="+", default=list(METHODS), choices=available_methods())
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws other calibration images")
    result.add_argument("--samples", type=int, default=512, help="calibration images; an eighth of them is held out")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of tables")
    return result


def run(args: argparse.Namespace, seed: int) -> list[Row]:
    """Every allocation once, for one draw of calibration images."""
    model, train, test = load(args.model, args.data)
    batches = train.sample(args.samples, seed).batches(64)
    bench = Bench(model.eval(), batches, test, args.methods, ["layer"], seed)
    held, unseen = split_samples(batches)[1], test.batches(250)
    judges = [make_objective("distill", model, x) for x in (held, unseen)]
    references = [make_reference(model, x) for x in (held, unseen)]
    options = replace(bench.options, rounding=args.rounding)
    rows: list[Row] = []
    seen = set()
    for method in args.methods:
        bits = bench.chooser.choose(method, AvgBits(args.avg_bits))
        if bits in seen:
            continue
        seen.add(bits)
        maker = prepare_candidates(model, bench.layers, bench.sizes, options, bench.reference)
        with preserved(model), maker.made(method, f"avg_bits={args.avg_bits:g}", bits):
            divergences, errors = [x.value(model) for x in judges], [x.error(model) for x in references]
            right = accuracy(model, test)
        row = Row(args.model, method, args.avg_bits, seed, divergences[0], errors[0], divergences[1], errors[1], right)
        progress(f"{args.model} seed {seed} {method}: {right:.1f} %, output error {errors[1]:.3f}")
        rows.append(row)
    return rows


def correlations(rows: Sequence[Row]) -> list[list[str]]:
    """Rank correlation of each judge with each truth over allocations; mean over seeds."""
    table = []
    for judge in JUDGES:
        cells = [judge]
        for truth in TRUTHS:
            found = []
            for seed in dict.fromkeys(row.seed for row in rows):
                mine = [row for row in rows if row.seed == seed]
                found.append(spearmanr([getattr(x, judge) for x in mine], [getattr(x, truth) for x in mine]).statistic)
            cells.append(f"{sum(found) / len(found):+.2f}  ({', '.join(f'{x:+.2f}' for x in found)})")
        table.append(cells)
    return table


def as_text(rows: Sequence[Row], args: argparse.Namespace, command: str) -> str:
    """The networks, and how far each judge ranks them as the test images do."""
    names = (*JUDGES, *TRUTHS)
    cells = [[str(x.seed), x.method, *(f"{getattr(x, n):.4f}" for n in names[:-1]), f"{x.accuracy:.1f}"] for x in rows]
    notes = (
        f"{args.model} at {args.avg_bits:g} bits, {args.rounding}; each seed draws {args.samples} calibration images, "
        "an eighth of them held out.\nThe second table has rank correlations (Spearman) over the allocations of a "
        f"seed: their mean, and each seed's.\nCommand: {command}"
    )
    tables = text_table(["seed", "method", *names], cells), text_table(["judge", *TRUTHS], correlations(rows))
    return "\n\n".join([*tables, notes])


if __name__ == "__main__":
    main()
