"""How near the composed error of the layers is to the output error that is observed, one row a network and bit-width.

python benchmarks/tightness.py --json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from networks import BLOCKS, DATA, Images, load_cifar10, load_network
from small_networks import SMALL, load_small
from torch import nn

from lightning_caq.errors import CAQError
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.measures.measure import measure
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers
from lightning_caq.report import text_table

WIDTHS = tuple(range(2, 9))
NAMES = ("bound", "correlated", "rss", "linear", "lipschitz")


@dataclass(frozen=True)
class Row:
    """One network with all weights at one bit-width, rounded to nearest; each prediction is divided by ``observed``.

    Attributes:
        model: The network.
        layers: Number of layers that are rounded.
        bits: The bit-width.
        observed: Root mean square over samples of the norm of the change of the logits.
        bound: Φ, the sum of the layers' errors at the output.
        correlated: Φ_corr, the bound that knows their correlations but not the signs.
        rss: Φ_rss, the root sum of squares.
        linear: The first-order error with its signs.
        lipschitz: Φ with Lipschitz constants.
        seconds: Time of this row, measuring Lipschitz constants not counted.
        seed: Seed of the samples.
    """

    model: str
    layers: int
    bits: int
    observed: float
    bound: float
    correlated: float
    rss: float
    linear: float
    lipschitz: float
    seconds: float
    seed: int


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        rows = [row for name in args.model for row in run(name, args)]
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"tightness.py: {error}")
    command = shlex.join(["python", "benchmarks/tightness.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args.samples, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*SMALL, *BLOCKS)
    result.add_argument("--model", nargs="+", choices=models, default=[*SMALL, "resnet20"], help="networks")
    result.add_argument("--bits", type=int, nargs="+", choices=WIDTHS, default=WIDTHS, help="bit-widths, one row each")
    result.add_argument("--samples", type=int, default=256, help="training images to measure on")
    result.add_argument("--seed", type=int, default=0, help="chooses these images")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def run(name: str, args: argparse.Namespace) -> list[Row]:
    """Measure one network at every bit-width."""
    model, train = load(name, args.data)
    if not 0 < args.samples <= len(train):
        raise ValueError(f"--samples {args.samples} is not allowed; {name} has 1 to {len(train):,} training images.")
    batches = [x for x, _ in train.sample(args.samples, args.seed).batches(64)]
    layers = find_layers(model, batches[0])
    profile = measure(model, batches, layers=layers, needs=frozenset({"lipschitz_amplification"}), seed=args.seed)
    progress(f"{name}: {len(layers)} layers, Lipschitz constants in {profile.seconds:.1f} s")
    reference = make_reference(model, batches)
    rows = []
    for bits in args.bits:
        start = time.perf_counter()
        found = tightness(model, layers, reference, profile, dict.fromkeys((x.name for x in layers), bits))
        seconds = round(time.perf_counter() - start, 2)
        rows.append(Row(name, len(layers), bits, found.observed, **found.ratios, seconds=seconds, seed=args.seed))
    return rows


def load(name: str, data: Path) -> tuple[nn.Module, Images]:
    """The trained network and the images it was trained on."""
    if name in SMALL:
        model, train, _ = load_small(name, data)
        return model, train
    return load_network(name, data), load_cifar10(data)[0]


def progress(message: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def as_text(rows: Sequence[Row], samples: int, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = ["network", "bits", "observed", "Φ", "Φ corr", "Φ rss", "signed", "Lipschitz", "seconds"]
    cells = [
        [row.model, str(row.bits), f"{row.observed:.3g}"]
        + [f"{getattr(row, name):.2f}" for name in NAMES[:-1]]
        + [f"{row.lipschitz:.3g}", f"{row.seconds:.1f}"]
        for row in rows
    ]
    notes = (
        "Observed: root mean square over samples of the norm of the change of the logits, all weights rounded to "
        "nearest.\nThe other columns are predictions divided by it. Measured on "
        f"{samples:,} training images.\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # a figure then does not depend on the machine's cores
    main()
