"""Scales of groups in a language model of characters: ours beside plain GPTQ at equal bytes.

python benchmarks/groups.py --bits 2 3 4 --group-size 64 128
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from characters import Text, calibration, log_probabilities, perplexity, shipped_text, trained_model
from gptq import TABLE_BITS, gptq, stored_bits
from stopwatch import machine
from torch import Tensor, nn

from lightning_caq import quantize
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import text_table

SAMPLES = 128
OURS = {"group_size": 64, "scale_dtype": "float16"}
WIDTHS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Row:
    """A network of one size and one calibration seed; figures are those of the test samples.

    Attributes:
        method: ``"gptq"`` or the method of allocation.
        asked: What was asked for: bits and groups of GPTQ, or the size that a network of ours was given.
        bytes: Bytes of all weights, scales and zero points.
        ratio: Bytes of the weights in float32 over those.
        kl: Mean KL divergence from the float network's next characters, nat.
        perplexity: Of the next characters.
        perplexity_ratio: That over the float network's.
        seed: Calibration seed.
        seconds: Wall-clock seconds, measuring included.
    """

    method: str
    asked: str
    bytes: int
    ratio: float
    kl: float
    perplexity: float
    perplexity_ratio: float
    seed: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """A float network, the text, what the network says of the test samples, and what was measured of it so far."""

    model: nn.Module
    text: Text
    log: Tensor
    device: str
    profiles: dict[tuple[str, int, bool], CurvatureProfile] = field(default_factory=dict)

    def gptq(self, bits: int, group_size: int, seed: int) -> Row:
        """A network rounded by GPTQ."""
        start, made = time.perf_counter(), copy.deepcopy(self.model)
        gptq(made, calibration(self.text.train, SAMPLES, seed, self.device), bits, group_size)
        tables = {id(module.weight) for module in made.modules() if isinstance(module, nn.Embedding)}
        size = sum(
            stored_bits(*weight.shape, TABLE_BITS if id(weight) in tables else bits, group_size)
            for weight in made.parameters()
            if weight.ndim == 2
        )
        seconds = time.perf_counter() - start
        return self._row(
            made, "gptq", f"{bits} bits, groups of {group_size}", size=size // 8, seed=seed, seconds=seconds
        )

    def ours(self, method: str, seed: int, asked: str, **options: float | str | None) -> Row:
        """A network of this package."""
        start = time.perf_counter()
        batches = calibration(self.text.train, SAMPLES, seed, self.device)
        result = quantize(
            self.model,
            batches,
            method=method,
            profile=self.profiles.get((method, seed, "group_size" in options)),
            seed=seed,
            bits=WIDTHS,
            calibration_samples=SAMPLES,
            curvature_samples=32,
            compare=(),
            guard=False,
            inplace=False,
            **options,
        )
        seconds = time.perf_counter() - start
        self.profiles[method, seed, "group_size" in options] = result.profile
        return self._row(result.model, method, asked, size=result.plan.bytes, seed=seed, seconds=seconds)

    def _row(self, model: nn.Module, method: str, asked: str, *, size: int, seed: int, seconds: float) -> Row:
        log = log_probabilities(model, self.text.test, self.device)
        now, before = (perplexity(x, self.text.test) for x in (log, self.log))
        return Row(
            method=method,
            asked=asked,
            bytes=size,
            ratio=4 * self.weights / size,
            kl=float((self.log.exp() * (self.log - log)).sum(1).mean()),
            perplexity=now,
            perplexity_ratio=now / before,
            seed=seed,
            seconds=seconds,
        )

    @property
    def weights(self) -> int:
        """Weights of all tables and matrices."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.ndim == 2)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    warnings.simplefilter("ignore")
    text, device = shipped_text(), "cuda" if torch.cuda.is_available() else "cpu"
    model = trained_model(text, steps=args.steps, device=device)
    case = Case(model, text, log_probabilities(model, text.test, device), device)
    rows = []
    for row in measure(case, args):
        rows.append(row)
        print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    command = shlex.join(["python", "benchmarks/groups.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, case, args, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bits of GPTQ")
    result.add_argument("--group-size", type=int, nargs="+", default=[64, 128], help="groups of GPTQ")
    result.add_argument("--method", nargs="+", default=["cet"], help="our methods of allocation")
    result.add_argument("--seeds", type=int, default=2, help="number of calibration seeds")
    result.add_argument("--steps", type=int, default=500, help="training steps of the network")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def measure(case: Case, args: argparse.Namespace) -> Iterator[Row]:
    """GPTQ at every size, ours at no more bytes than each, and ours at 2.5 bits a weight."""
    for seed in range(args.seeds):
        for bits in args.bits:
            for group_size in args.group_size:
                theirs = case.gptq(bits, group_size, seed)
                yield theirs
                for method in args.method:
                    yield case.ours(method, seed, f"as {theirs.asked}", ratio=theirs.ratio, **OURS)
        for method in args.method:
            yield case.ours(method, seed, "2.5 bits, a scale a channel", avg_bits=2.5)
            yield case.ours(method, seed, "2.5 bits, groups of 64", avg_bits=2.5, **OURS)


def as_text(rows: Sequence[Row], case: Case, args: argparse.Namespace, command: str) -> str:
    """Means over seeds, and what a reader needs to judge and to repeat them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.asked, row.method), []).append(row)
    header = ["size", "method", "bytes", "ratio", "KL", "perplexity", "over float", "seconds"]
    forms = ("bytes", ",.0f"), ("ratio", ".2f"), ("kl", ".4f"), ("perplexity", ".3f"), ("perplexity_ratio", ".3f")
    cells = [
        [
            *key,
            *(
                format(statistics.mean(getattr(x, name) for x in of_key), form)
                for name, form in (*forms, ("seconds", ".0f"))
            ),
        ]
        for key, of_key in groups.items()
    ]
    notes = (
        f"Perplexity of the float network: {perplexity(case.log, case.text.test):.3f}; {case.weights:,} weights; means "
        f"over {args.seeds} calibration seeds of {SAMPLES} samples. All bytes of weights, scales and zero points "
        f"counted; ours has {OURS}.\n{machine()}\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    main()
