"""Every method of allocation under one quantizer: accuracy, objective, and how far the prediction held.

python benchmarks/methods.py --model resnet20 --avg-bits 4 3 2.5 2.25 --rounding nearest error_feedback
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from networks import BLOCKS, DATA, Images, accuracy, load_cifar10, load_network
from small_networks import SMALL, load_small
from torch import nn

from lightning_caq import measure
from lightning_caq.allocation.budget import AvgBits
from lightning_caq.allocation.choose import GRANULARITIES, Choice, Chooser, check_separable
from lightning_caq.allocation.methods import available_methods, get_method
from lightning_caq.errors import CAQError
from lightning_caq.measures.rounding.rounded_loss import rounded_loss
from lightning_caq.network.batches import take_samples
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers, layer_sizes
from lightning_caq.network.objective import objective_from
from lightning_caq.options import ALWAYS, CHOICES, QuantizationOptions
from lightning_caq.report import text_table
from lightning_caq.selection.candidate import prepare_candidates
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.progress import Progress


@dataclass(frozen=True)
class Row:
    """One method at one budget, over several seeds.

    Attributes:
        model: The network.
        method: How bits were allocated.
        rounding: How weights were rounded.
        granularity: Whether whole layers or groups of output channels get bits.
        avg_bits: The budget.
        accuracy: Mean over seeds of the accuracy on the test images, percent.
        accuracy_stderr: Its standard error over seeds of calibration data, in points; test images are the same.
        objective: Mean calibration objective of the quantized network, nat.
        predicted: Mean loss change that the profile predicts for the bits with nearest rounding, nat.
        observed: Mean loss change of the same bits, as rounded and repaired, nat.
        size: Mean size of the quantized weights with scales, zero points and widths, bytes.
        seconds: Mean seconds to allocate, round and repair; measuring serves all methods and is not in it.
    """

    model: str
    method: str
    rounding: str
    granularity: str
    avg_bits: float
    accuracy: float
    accuracy_stderr: float
    objective: float
    predicted: float | None
    observed: float
    size: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What one seed gave."""

    accuracy: float
    objective: float
    predicted: float | None
    size: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        rows = compare(args)
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"methods.py: {error}")
    command = shlex.join(["python", "benchmarks/methods.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", choices=(*BLOCKS, *SMALL), default="resnet20")
    result.add_argument("--avg-bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.25])
    result.add_argument("--rounding", choices=CHOICES["rounding"], nargs="+", default=["nearest", "error_feedback"])
    result.add_argument("--granularity", choices=GRANULARITIES, nargs="+", default=["layer"])
    result.add_argument("--methods", nargs="+", default=list(available_methods()), choices=available_methods())
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws other calibration images")
    result.add_argument("--samples", type=int, default=512, help="calibration images")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def compare(args: argparse.Namespace) -> list[Row]:
    """All methods at all budgets; one measurement a seed serves them all."""
    model, train, test = load(args.model, args.data)
    keys = [
        (rounding, granularity, avg_bits, method)
        for rounding in args.rounding
        for granularity in args.granularity
        for avg_bits in args.avg_bits
        for method in args.methods
        if granularity == "layer" or is_separable(method)
    ]
    outcomes: dict[tuple[str, str, float, str], list[Outcome]] = {key: [] for key in keys}
    for seed in args.seeds:
        batches = train.sample(args.samples, seed).batches(64)
        bench = Bench(model.eval(), batches, test, args.methods, args.granularity, seed)
        for key in keys:
            outcome = bench.run(*key)
            outcomes[key].append(outcome)
            progress(
                f"{args.model} seed {seed} {' '.join(map(str, key))}: {outcome.accuracy:.1f} %, "
                f"objective {outcome.objective:.4f}, {outcome.seconds:.1f} s"
            )
    return [summary(args.model, *key, found) for key, found in outcomes.items()]


class Bench:
    """One network with one set of calibration samples; measured once, then allocated, rounded and judged at will."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        test: Images,
        methods: Sequence[str],
        granularities: Sequence[str],
        seed: int,
    ) -> None:
        self.model, self.batches, self.test, self.seed = model, batches, test, seed
        self.layers = find_layers(model, batches[0])
        self.sizes = layer_sizes(self.layers)
        self.options = QuantizationOptions(avg_bits=4, seed=seed)
        self.reference = make_reference(model, batches)
        self.objective = objective_from("distill", self.reference)
        groups = {"channel_groups"} if "channel_group" in granularities else set()
        needs = ALWAYS.union(groups, *(get_method(name).needs for name in methods))
        self.profile = measure(model, batches, layers=self.layers, needs=needs, seed=seed, progress=Progress(progress))
        samples = take_samples(batches, self.profile.samples)
        loss = rounded_loss(model, self.layers, self.objective.on(model, samples), self.options.bits)
        norm = self.reference.on(model, samples).size
        self.chooser = Chooser(self.profile, self.sizes, self.options.bits, norm, loss, seed)
        self.choices: dict[tuple[str, str, float], tuple[Choice, float]] = {}
        self.found: dict[tuple[str, Choice], tuple[float, float, int, float]] = {}

    def run(self, rounding: str, granularity: str, avg_bits: float, method: str) -> Outcome:
        """Allocate by one method, and round and judge unless the same bits were rounded before."""
        key = granularity, method, avg_bits
        if key not in self.choices:
            start = time.perf_counter()
            bits = replace(self.chooser, granularity=granularity).choose(method, AvgBits(avg_bits))
            self.choices[key] = bits, time.perf_counter() - start
        bits, seconds = self.choices[key]
        if (rounding, bits) not in self.found:
            start = time.perf_counter()
            options = replace(self.options, rounding=rounding)
            with preserved(self.model):
                maker = prepare_candidates(self.model, self.layers, self.sizes, options, self.reference)
                with maker.made(method, f"avg_bits={avg_bits:g}", bits) as candidate:
                    spent = time.perf_counter() - start
                    judged = accuracy(self.model, self.test), self.objective.value(self.model), candidate.plan.bytes
            self.found[rounding, bits] = *judged, spent
        right, objective, size, spent = self.found[rounding, bits]
        names = [layer.name for layer in self.layers]
        predicted = self.profile.predicted_loss(dict(zip(names, bits.bits, strict=True)))
        return Outcome(right, objective, predicted, size, seconds + spent)


def progress(line: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(line, file=sys.stderr, flush=True)


def load(name: str, data: Path) -> tuple[nn.Module, Images, Images]:
    """A trained network with its training and test images."""
    if name in SMALL:
        return load_small(name, data)
    return load_network(name, data), *load_cifar10(data)


def is_separable(method: str) -> bool:
    """Whether a method can give bits to groups of channels."""
    try:
        check_separable(method)
    except CAQError:
        return False
    return True


def summary(model: str, rounding: str, granularity: str, avg_bits: float, method: str, found: Sequence[Outcome]) -> Row:
    """Means over seeds."""
    accuracies = [x.accuracy for x in found]
    spread = statistics.stdev(accuracies) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    predicted = [x.predicted for x in found if x.predicted is not None]
    objective = statistics.fmean(x.objective for x in found)
    return Row(
        model=model,
        method=method,
        rounding=rounding,
        granularity=granularity,
        avg_bits=avg_bits,
        accuracy=round(statistics.fmean(accuracies), 3),
        accuracy_stderr=round(spread, 3),
        objective=objective,
        predicted=statistics.fmean(predicted) if predicted else None,
        observed=objective,
        size=round(statistics.fmean(x.size for x in found)),
        seconds=round(statistics.fmean(x.seconds for x in found), 2),
    )


def as_text(rows: Sequence[Row], args: argparse.Namespace, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = [
        "method",
        "rounding",
        "granularity",
        "bits",
        "bytes",
        "accuracy %",
        "± s.e.",
        "objective",
        "predicted",
        "seconds",
    ]
    cells = [
        [
            row.method,
            row.rounding,
            row.granularity,
            f"{row.avg_bits:g}",
            f"{row.size:,.0f}",
            f"{row.accuracy:.2f}",
            f"{row.accuracy_stderr:.2f}",
            f"{row.objective:.4f}",
            "–" if row.predicted is None else f"{row.predicted:.4f}",
            f"{row.seconds:.1f}",
        ]
        for row in rows
    ]
    notes = (
        f"{args.model}; means over calibration seeds {args.seeds}, {args.samples} calibration images each; s.e. is "
        "over these\nseeds, on the same test images. Objective: divergence from the float outputs on the calibration "
        f"images, nat.\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    main()
