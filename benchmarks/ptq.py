"""Accuracy of a trained network after quantization without training, one row a budget and seed.

python benchmarks/ptq.py --model resnet20 --avg-bits 3 2.5 2.25 2 --seed 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from networks import BLOCKS, DATA, Images, ResNet, accuracy, load_cifar10, load_network

from lightning_caq import CurvatureProfile, quantize
from lightning_caq.errors import CAQError
from lightning_caq.options import CHOICES, QuantizationOptions
from lightning_caq.report import text_table


@dataclass(frozen=True)
class Row:
    """One budget: what was asked for, and what came out of it.

    Attributes:
        model: The network.
        method: How bits were allocated.
        rounding: How weights were rounded.
        asked_bits: The budget, in bits a weight on average; ``None`` where it is one of operations alone.
        avg_bits: What the network has, Σ n b / Σ n.
        ratio: Float32 size over quantized size, scales and zero points counted.
        accuracy: Of the quantized network on the test images, in percent.
        float_accuracy: Of the float network on the same images, in percent.
        seconds: Time that ``quantize`` took; the first budget measures curvature, later ones use its profile.
        steps: Step of the work to the seconds it took.
        peak_mb: Most memory that this process has held so far, in MiB.
        seed: Seed of the calibration subset and of every random number.
        gpu_mb: Most memory that ``quantize`` has taken on the GPU, in MiB; 0 on a CPU.
    """

    model: str
    method: str
    rounding: str
    asked_bits: float | None
    avg_bits: float
    ratio: float
    accuracy: float
    float_accuracy: float
    seconds: float
    steps: dict[str, float]
    peak_mb: float
    seed: int
    gpu_mb: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        runs = [[options_of(args, bits, seed) for bits in budgets(args)] for seed in args.seed]
        train, test = load_cifar10(args.data)
        if args.samples > len(train):
            raise ValueError(f"--samples {args.samples} is more than the {len(train):,} training images there are.")
        model = load_network(args.model, args.data).to(args.device)
        float_accuracy = accuracy(model, test)
        rows = []
        for seed, run_options in zip(args.seed, runs, strict=True):
            calibration, profile = train.sample(args.samples, seed), None
            for options in run_options:
                row, profile = run(model, options, args.model, calibration, test, float_accuracy, profile)
                rows.append(row)
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"ptq.py: {error}")
    command = shlex.join(["python", "benchmarks/ptq.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, len(test), args, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", choices=tuple(BLOCKS), default="resnet20")
    result.add_argument("--avg-bits", type=float, nargs="+", help="budgets, one row each; by default 3 2.5 2.25")
    result.add_argument("--bops", type=float, help="billions of bit operations a sample, alone or beside --avg-bits")
    result.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], help="bit-widths to choose from")
    result.add_argument("--method", default="cet", help="how bits are allocated")
    result.add_argument("--rounding", choices=CHOICES["rounding"], default="error_feedback")
    result.add_argument("--batchnorm", choices=CHOICES["batchnorm"], default="recentre")
    result.add_argument(
        "--activation-bits",
        type=input_bits,
        help="bits of the layers' inputs, or 'mixed' with --bops; float32 by default",
    )
    result.add_argument("--guard", action="store_true", help="make uniform's network too and keep the better one")
    result.add_argument("--samples", type=int, default=512, help="training images to calibrate on")
    result.add_argument("--seed", type=int, nargs="+", default=[0], help="chooses these images and all that is random")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--device", default="cpu", help="where the network is, such as cuda; the images are on the CPU")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def input_bits(text: str) -> int | str:
    """Bits of inputs as they are given on the command line."""
    return text if text == "mixed" else int(text)


def budgets(args: argparse.Namespace) -> list[float | None]:
    """Average bits of each row; none where operations alone are limited."""
    return args.avg_bits or ([None] if args.bops is not None else [3.0, 2.5, 2.25])


def options_of(args: argparse.Namespace, avg_bits: float | None, seed: int) -> QuantizationOptions:
    """The options of one budget; made before any work, so that a wrong one is told at once."""
    return QuantizationOptions(
        method=args.method,
        avg_bits=avg_bits,
        bops=args.bops,
        bits=args.bits,
        rounding=args.rounding,
        batchnorm=args.batchnorm,
        calibration_samples=args.samples,
        compare=(),
        guard=args.guard,
        activation_bits=args.activation_bits,
        seed=seed,
    )


def run(
    model: ResNet,
    options: QuantizationOptions,
    name: str,
    calibration: Images,
    test: Images,
    float_accuracy: float,
    profile: CurvatureProfile | None,
) -> tuple[Row, CurvatureProfile]:
    """Quantize a copy of ``model`` to one budget and measure it; what was measured serves the next budget."""
    progress(f"{name}: {options.method} at {options.budget} ...")
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    batches = calibration.batches(64)
    result = quantize(copy.deepcopy(model), batches, **asdict(options), profile=profile, say=progress)
    seconds = time.perf_counter() - start
    gpu_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
    row = Row(
        model=name,
        method=options.method,
        rounding=options.rounding,
        asked_bits=options.avg_bits,
        avg_bits=result.plan.avg_bits,
        ratio=result.plan.ratio,
        accuracy=accuracy(result.model.eval(), test),
        float_accuracy=float_accuracy,
        seconds=round(seconds, 2),
        steps={step: round(spent, 2) for step, spent in result.report.seconds.items()},
        peak_mb=round(peak_mb(), 1),
        seed=options.seed,
        gpu_mb=round(gpu_mb, 1),
    )
    progress(f"{name}: {row.accuracy:.1f} % at {row.avg_bits:.3f} bits in {seconds:.0f} s")
    return row, result.profile


def progress(message: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def peak_mb() -> float:
    """Most memory this process has held, in MiB; the system counts it in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def as_text(rows: Sequence[Row], images: int, args: argparse.Namespace, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = ["network", "seed", "asked bits", "avg bits", "ratio"]
    header += ["accuracy %", "± s.e.", "float %", "seconds", "peak MB", "GPU MB"]
    cells = [
        [
            f"{row.model} {row.method} {row.rounding}",
            str(row.seed),
            "–" if row.asked_bits is None else f"{row.asked_bits:g}",
            f"{row.avg_bits:.3f}",
            f"{row.ratio:.2f}x",
            f"{row.accuracy:.1f}",
            f"{standard_error(row.accuracy, images):.1f}",
            f"{row.float_accuracy:.1f}",
            f"{row.seconds:.1f}",
            f"{row.peak_mb:,.0f}",
            f"{row.gpu_mb:,.0f}",
        ]
        for row in rows
    ]
    notes = (
        f"Accuracy on n = {images:,} test images of CIFAR-10; s.e. is the binomial standard error of one figure. "
        f"Calibrated on\n{args.samples:,} training images drawn by the seed. Average bits count the weights "
        "alone,\nthe ratio scales and zero points too. A seed's first row includes measuring, the next rows use "
        "its profile.\nPeak memory is that of the process, data and all.\n"
        f"Command: {command}"
    )
    steps = step_table(rows[0].model, rows[0].steps)
    return "\n\n".join([text_table(header, cells), *means(rows), steps, notes])


def step_table(name: str, steps: Mapping[str, float]) -> str:
    """Where the time of one network went."""
    total = sum(steps.values())
    cells = [[step, f"{spent:.1f}", f"{spent / total:.0%}"] for step, spent in steps.items()]
    return text_table([f"{name}, first row", "seconds", "share"], cells)


def means(rows: Sequence[Row]) -> list[str]:
    """Means over seeds, where there are several; the standard error is over seeds, on the same test images."""
    seeds = len({row.seed for row in rows})
    if seeds < 2:
        return []
    cells = []
    for bits in dict.fromkeys(row.asked_bits for row in rows):
        found = [row.accuracy for row in rows if row.asked_bits == bits]
        error = statistics.stdev(found) / math.sqrt(seeds)
        cells.append(["–" if bits is None else f"{bits:g}", f"{statistics.fmean(found):.2f}", f"{error:.2f}"])
    return [text_table(["asked bits", f"mean of {seeds} seeds %", "± s.e."], cells)]


def standard_error(percent: float, images: int) -> float:
    """Binomial standard error of an accuracy, in percent.

    Example:
        >>> round(standard_error(91.5, 1000), 2)
        0.88
    """
    return math.sqrt(percent * (100 - percent) / images)


if __name__ == "__main__":
    main()
