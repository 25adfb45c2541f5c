"""The table of results: accuracy after quantization without training, over seeds, beside the drop that is allowed.

python benchmarks/results.py
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ptq
from networks import BLOCKS, DATA, accuracy, load_cifar10, load_network

from lightning_caq.errors import CAQError
from lightning_caq.options import QuantizationOptions
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import text_table

WIDTHS = (2, 3, 4, 5, 6, 8)
SAMPLES = 512


@dataclass(frozen=True)
class Case:
    """One row: a network, what it may take, and how much accuracy that may cost.

    Attributes:
        model: The network.
        asked_bits: The budget, in bits a weight on average.
        allowed: Largest drop in accuracy that is accepted, points; ``None`` where none was set.
        aim: Drop that is aimed at, points.
        bits: Bit-widths to choose from.
        inputs: Bits of the layers' inputs; ``None`` leaves them in float32.
    """

    model: str
    asked_bits: float
    allowed: float | None = None
    aim: float | None = None
    bits: tuple[int, ...] = WIDTHS
    inputs: int | None = None


CASES = (
    Case("resnet20", 2.25, allowed=1.0, aim=0.3),
    Case("resnet20", 3.0, allowed=0.1, aim=0.0),
    Case("resnet20", 2.5, allowed=0.5, aim=0.0),
    Case("resnet20", 2.0, allowed=1.7, aim=0.7),
    Case("resnet20", 1.75, aim=2.5, bits=(1, *WIDTHS)),
    Case("resnet20", 2.25, allowed=1.5, aim=0.7, inputs=4),
    Case("resnet32", 2.5, allowed=0.5),
    Case("resnet32", 2.25, allowed=1.0),
)


@dataclass(frozen=True)
class Result:
    """One case over the seeds.

    Attributes:
        case: What was asked.
        avg_bits: Bits a weight of the network of the first seed.
        ratio: Its float32 size over its quantized size, scales and zero points counted.
        float_accuracy: Of the float network, percent.
        accuracies: Of the quantized networks, one a seed, percent.
        seconds: Of ``quantize``, one a seed; the first case of a network measures, the next ones use its profile.
        steps: Seconds of each step of the first seed.
        peak_mb: Most memory the process has held so far, MiB.
    """

    case: Case
    avg_bits: float
    ratio: float
    float_accuracy: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    steps: dict[str, float]
    peak_mb: float

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds, percent."""
        return statistics.fmean(self.accuracies)

    @property
    def stderr(self) -> float:
        """Its standard error over seeds, the test images held; NaN for one seed."""
        count = len(self.accuracies)
        return statistics.stdev(self.accuracies) / math.sqrt(count) if count > 1 else math.nan

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.float_accuracy - self.mean


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        results = [x for model in args.model for x in run(model, args.seed, args.data)]
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"results.py: {error}")
    command = shlex.join(["python", "benchmarks/results.py", *(sys.argv[1:] if argv is None else argv)])
    print(as_json(results) if args.json else as_text(results, args.seed, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", nargs="+", choices=tuple(BLOCKS), default=list(BLOCKS), help="networks")
    result.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="each draws other calibration images")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def run(name: str, seeds: Sequence[int], data: Path) -> list[Result]:
    """All cases of one network; one measurement a seed and set of bit-widths serves them."""
    train, test = load_cifar10(data)
    model = load_network(name, data)
    float_accuracy = accuracy(model, test)
    cases = [case for case in CASES if case.model == name]
    rows: dict[Case, list[ptq.Row]] = {case: [] for case in cases}
    for seed in seeds:
        calibration = train.sample(SAMPLES, seed)
        profiles: dict[tuple[int, ...], CurvatureProfile] = {}
        for case in cases:
            options = QuantizationOptions(
                avg_bits=case.asked_bits,
                bits=case.bits,
                activation_bits=case.inputs,
                calibration_samples=SAMPLES,
                compare=(),
                guard=False,
                seed=seed,
            )
            row, profiles[case.bits] = ptq.run(
                model, options, name, calibration, test, float_accuracy, profiles.get(case.bits)
            )
            rows[case].append(row)
    return [summary(case, found) for case, found in rows.items()]


def summary(case: Case, rows: Sequence[ptq.Row]) -> Result:
    """What the seeds gave."""
    return Result(
        case=case,
        avg_bits=rows[0].avg_bits,
        ratio=rows[0].ratio,
        float_accuracy=rows[0].float_accuracy,
        accuracies=tuple(row.accuracy for row in rows),
        seconds=tuple(row.seconds for row in rows),
        steps=rows[0].steps,
        peak_mb=max(row.peak_mb for row in rows),
    )


def as_json(results: Sequence[Result]) -> str:
    """Rows as objects, the case's fields among the others."""
    rows = [{**asdict(x.case), **asdict(x), "mean": x.mean, "stderr": x.stderr, "drop": x.drop} for x in results]
    return json.dumps([{key: value for key, value in row.items() if key != "case"} for row in rows], indent=1)


def as_text(results: Sequence[Result], seeds: Sequence[int], command: str) -> str:
    """The table, where the time of each network's first case went, and what a reader needs to repeat it."""
    header = ["network", "bits", "inputs", "ratio", *(f"seed {seed}" for seed in seeds)]
    header += ["mean %", "± s.e.", "drop", "allowed", "aim", "seconds"]
    cells = [
        [
            x.case.model,
            f"{x.case.asked_bits:g}",
            "float" if x.case.inputs is None else f"{x.case.inputs} bits",
            f"{x.ratio:.1f}x",
            *(f"{each:.1f}" for each in x.accuracies),
            f"{x.mean:.2f}",
            f"{x.stderr:.2f}",
            f"{x.drop:.2f}",
            "–" if x.case.allowed is None else f"{x.case.allowed:g}",
            "–" if x.case.aim is None else f"{x.case.aim:g}",
            f"{statistics.fmean(x.seconds):.0f}",
        ]
        for x in results
    ]
    firsts = [next(x for x in results if x.case.model == name) for name in dict.fromkeys(x.case.model for x in results)]
    floats = ", ".join(f"{x.case.model} {x.float_accuracy:.1f} %" for x in firsts)
    notes = (
        f"Float: {floats}. Accuracy on 1,000 test images of CIFAR-10; s.e. is over seeds, the test images the same. "
        f"{SAMPLES}\ncalibration images a seed. Drop, allowed and aim in points. The first row of a network includes "
        f"measuring.\nPeak memory of the process: {max(x.peak_mb for x in results):,.0f} MB.\nCommand: {command}"
    )
    return "\n\n".join([text_table(header, cells), *(ptq.step_table(x.case.model, x.steps) for x in firsts), notes])


if __name__ == "__main__":
    main()
