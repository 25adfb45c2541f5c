"""Rate and distortion: test figures at given ratios, entropy-coded and with fixed widths, over calibration seeds.

python benchmarks/rate.py --model resnet20 --ratio 16 18 21.5 25.5
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nnc
import torch
from networks import BLOCKS, DATA, Images, accuracy, load_cifar10, load_network
from stopwatch import machine
from torch import Tensor, nn
from unlike_networks import UNLIKE, trained

from lightning_caq import quantize
from lightning_caq.errors import CAQError
from lightning_caq.report import text_table

SAMPLES = 512
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
FLOAT = "float"


@dataclass(frozen=True)
class Row:
    """A network of one size and one calibration seed; figures are those of the test images.

    Attributes:
        model: The network.
        coding: ``"entropy"`` or ``"fixed"``, ``"nncodec"``, or ``"float"`` for the float network.
        method: The method of allocation.
        ratio: Bytes of the weights in float32 over those of the quantized ones, scales and steps counted.
        bytes: Bytes of the quantized weights.
        kl: Mean KL divergence from the float network's outputs, nat.
        output_error: Root mean square of the change of the outputs, a part of theirs.
        log_error_ratio: Mean over test images of ln(error / error of fixed widths of the same ratio and seed).
        accuracy: Percentage of test images.
        gap_bits: Bits a weight above Shannon's lower bound.
        seed: Calibration seed.
        seconds: Wall-clock seconds of the whole run, measuring included.
    """

    model: str
    coding: str
    method: str
    ratio: float
    bytes: int
    kl: float = 0.0
    output_error: float = 0.0
    log_error_ratio: float | None = None
    accuracy: float = 0.0
    gap_bits: float | None = None
    seed: int = 0
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.ratio) <= 1 or args.seeds < 1:
        sys.exit("rate.py: --ratio must be above 1, --seeds from 1 up.")
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    try:
        for name in args.model:
            for row in measure(name, args.ratio, args):
                rows.append(row)
                print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    except FileNotFoundError as error:
        sys.exit(f"rate.py: {error}")
    command = shlex.join(["python", "benchmarks/rate.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", nargs="+", choices=[*BLOCKS, *UNLIKE], default=["resnet20"], help="networks")
    result.add_argument("--ratio", type=float, nargs="+", default=[16.0, 18.0, 21.5, 25.5], help="ratios")
    result.add_argument("--method", nargs="+", default=["caq"], help="methods of the entropy-coded rows")
    result.add_argument("--seeds", type=int, default=3, help="number of calibration seeds")
    result.add_argument("--data", type=Path, default=DATA, help="folder that holds the networks and images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def measure(name: str, ratios: Sequence[float], args: argparse.Namespace) -> Iterator[Row]:
    """All rows of one network, the float one first."""
    train, test = load_cifar10(args.data)
    network = load_network(name, args.data) if name in BLOCKS else trained(name, train)
    case = Case(name, network, test, predict(network, test))
    weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    yield Row(name, FLOAT, "", 1.0, 4 * weights, accuracy=accuracy(network, test))
    for seed in range(args.seeds):
        calibration = train.sample(SAMPLES, seed)
        for ratio in ratios:
            fixed = case.quantized(calibration, seed, coding="fixed", method="cet", ratio=ratio)
            if fixed is not None:
                yield fixed[0]
            per_image = None if fixed is None else fixed[1]
            if nnc.installed():
                yield case.peer(ratio, seed, per_image)
            for method in args.method:
                coded = case.quantized(
                    calibration, seed, coding="entropy", method=method, ratio=ratio, fixed_errors=per_image
                )
                if coded is not None:
                    yield coded[0]


@dataclass(frozen=True)
class Case:
    """A float network, the test images and its outputs on them."""

    name: str
    network: nn.Module
    test: Images
    outputs: Tensor

    def quantized(
        self,
        calibration: Images,
        seed: int,
        *,
        coding: str,
        method: str,
        ratio: float,
        fixed_errors: Tensor | None = None,
    ) -> tuple[Row, Tensor] | None:
        """A row and the error of each test image; nothing where the ratio cannot be met."""
        start = time.perf_counter()
        try:
            result = quantize(
                self.network,
                calibration.batches(64),
                method=method,
                ratio=ratio,
                coding=coding,
                bits=WIDTHS,
                compare=(),
                guard=False,
                seed=seed,
                inplace=False,
            )
        except CAQError as error:
            print(f"{self.name}, {coding}, {ratio:g}x: {error}", file=sys.stderr)
            return None
        limit = result.report.rate_limit
        return self._judged(
            result.model,
            Row(
                model=self.name,
                coding=coding,
                method=method,
                ratio=result.plan.ratio,
                bytes=result.plan.bytes,
                gap_bits=None if limit is None else limit.gap,
                seed=seed,
                seconds=time.perf_counter() - start,
            ),
            fixed_errors,
        )

    def peer(self, ratio: float, seed: int, fixed_errors: Tensor | None) -> Row:
        """The row of nncodec, which looks at no data."""
        start = time.perf_counter()
        made, size = nnc.coded_network(self.network, ratio)
        weights = sum(p.numel() for p in self.network.parameters() if p.ndim > 1)
        seconds = time.perf_counter() - start
        row = Row(self.name, "nncodec", "", ratio=4 * weights / size, bytes=size, seed=seed, seconds=seconds)
        return self._judged(made, row, fixed_errors)[0]

    def _judged(self, model: nn.Module, row: Row, fixed_errors: Tensor | None) -> tuple[Row, Tensor]:
        """The row with the figures of the test images, and the error of each of them."""
        made, outputs = predict(model, self.test), self.outputs
        errors = (made - outputs).square().sum(1)
        log, log_made = outputs.log_softmax(1), made.log_softmax(1)
        judged = replace(
            row,
            kl=float((log.exp() * (log - log_made)).sum(1).mean()),
            output_error=math.sqrt(float(errors.mean() / outputs.square().sum(1).mean())),
            log_error_ratio=None if fixed_errors is None else float((errors / fixed_errors).log().mean() / 2),
            accuracy=accuracy(model, self.test),
        )
        return judged, errors


def predict(model: nn.Module, images: Images) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in images.batches(250)])


def as_text(rows: Sequence[Row], command: str) -> str:
    """Means over seeds, and what a reader needs to judge and to repeat them."""
    header = ["model", "coding", "method", "ratio", "bytes", "KL", "error", "ln ratio", "accuracy", "gap", "seconds"]
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.coding, row.method, round(row.ratio)), []).append(row)
    cells = [[*key[:3], *means(group)] for key, group in groups.items()]
    seeds = 1 + max(row.seed for row in rows)
    notes = (
        f"Test figures on 1,000 images, means over {seeds} calibration seeds of {SAMPLES} images; all bytes of "
        "weights, steps and scales counted. ln ratio: mean over images of the logarithm of the error over that of "
        f"fixed widths at the same ratio.\n{machine()}\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


def means(group: Sequence[Row]) -> list[str]:
    def mean(name: str, form: str) -> str:
        values = [getattr(row, name) for row in group]
        return "–" if None in values else format(statistics.mean(values), form)

    forms = (
        ("ratio", ".2f"),
        ("bytes", ",.0f"),
        ("kl", ".4f"),
        ("output_error", ".4f"),
        ("log_error_ratio", ".3f"),
        ("accuracy", ".2f"),
        ("gap_bits", ".3f"),
        ("seconds", ".0f"),
    )
    return [mean(name, form) for name, form in forms]


if __name__ == "__main__":
    main()
