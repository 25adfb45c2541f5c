"""The roundings beside each other: the same bits, what each does along the steep directions, and what comes of it.

python benchmarks/rounding.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from networks import BLOCKS, DATA, Images, accuracy, load_cifar10, load_network
from torch import Tensor, nn

from lightning_caq.allocation.budget import AvgBits
from lightning_caq.allocation.choose import Chooser
from lightning_caq.allocation.methods import get_method
from lightning_caq.errors import CAQError
from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounded_loss import rounded_loss
from lightning_caq.network.batches import take_samples
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import Layer, find_layers, layer_sizes, layer_weight
from lightning_caq.network.objective import make_objective
from lightning_caq.options import ALWAYS, CHOICES, QuantizationOptions
from lightning_caq.report import text_table
from lightning_caq.selection.candidate import prepare_candidates
from lightning_caq.selection.long_axis import prepare_long_axis
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.progress import Progress

METHOD, SAMPLES, EIGENPAIRS = "cet", 512, 64


@dataclass(frozen=True)
class Row:
    """One rounding of one network.

    Attributes:
        avg_bits: The budget, in bits a weight on average.
        rounding: The rounding.
        seed: Seed of the calibration images.
        accuracy: On the test images, percent.
        fitted: Divergence from the float network on the calibration images, nat.
        other: The same on the training images that were not used.
        energy: Σ_j |λ_j| (v_jᵀΔ)² in the short-axis subspace S, nat.
        error: ‖Δ‖², weight².
        share: Of the energy in S in itself plus μ ‖Δ‖².
    """

    avg_bits: float
    rounding: str
    seed: int
    accuracy: float
    fitted: float
    other: float
    energy: float
    error: float
    share: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        train, test = load_cifar10(args.data)
        model = load_network(args.model, args.data)
        rows = [row for seed in args.seed for row in run(model, train, test, args, seed)]
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"rounding.py: {error}")
    command = shlex.join(["python", "benchmarks/rounding.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", choices=tuple(BLOCKS), default="resnet20")
    result.add_argument("--avg-bits", type=float, nargs="+", default=[3.0, 2.5], help="budgets")
    result.add_argument(
        "--rounding", choices=CHOICES["rounding"], nargs="+", default=["nearest", "long_axis", "error_feedback"]
    )
    result.add_argument("--batchnorm", choices=CHOICES["batchnorm"], default="recentre")
    result.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="each draws other calibration images")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained networks and the images")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def run(model: nn.Module, train: Images, test: Images, args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Measure once, then round the same bits in every way."""
    chosen, left = split(train, SAMPLES, seed)
    batches = chosen.batches(64)
    layers = find_layers(model, batches[0])
    sizes, needs = layer_sizes(layers), ALWAYS | get_method(METHOD).needs
    profile = measure(model, batches, layers=layers, needs=needs, seed=seed, progress=Progress(progress))
    samples = take_samples(batches, profile.samples)
    measured = make_objective("distill", model, samples)
    long_axis = prepare_long_axis(model, layers, measured, eigenpairs=EIGENPAIRS, seed=seed)
    reference = make_reference(model, batches)
    fitted, other = (make_objective("distill", model, images.batches(64)) for images in (chosen, left))
    floats = [layer_weight(model, layer).detach().clone() for layer in layers]
    for avg_bits in args.avg_bits:
        options = QuantizationOptions(avg_bits=avg_bits, batchnorm=args.batchnorm, seed=seed)
        loss = rounded_loss(model, layers, measured, options.bits)
        chooser = Chooser(profile, sizes, options.bits, reference.on(model, samples).size, loss, seed)
        choice = chooser.choose(METHOD, AvgBits(avg_bits))
        for rounding in args.rounding:
            used = long_axis if rounding == "long_axis" else None
            how = replace(options, rounding=rounding)
            maker = prepare_candidates(model, layers, sizes, how, reference, used)
            with preserved(model), maker.made(METHOD, str(options.budget), choice):
                delta = errors(model, layers, floats)
                energy, square = long_axis.shape.steep_energy(delta), float(delta.square().sum())
                yield Row(
                    avg_bits=avg_bits,
                    rounding=rounding,
                    seed=seed,
                    accuracy=accuracy(model, test),
                    fitted=fitted.value(model),
                    other=other.value(model),
                    energy=energy,
                    error=square,
                    share=energy / (energy + long_axis.shape.residual * square),
                )


def split(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """The images that ``sample`` draws, and the rest."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.sample(count, seed), Images(images.x[order[count:]], images.y[order[count:]])


def errors(model: nn.Module, layers: Sequence[Layer], floats: Sequence[Tensor]) -> Tensor:
    """Δ of all layers, one after the other, float64."""
    now = [layer_weight(model, layer).detach() for layer in layers]
    return torch.cat([(a.double() - b.double()).flatten() for a, b in zip(now, floats, strict=True)])


def progress(message: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def as_text(rows: Sequence[Row], args: argparse.Namespace, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = ["bits", "rounding", "seed", "accuracy %", "divergence", "on others", "energy in S", "‖Δ‖²", "share"]
    cells = [
        [
            f"{row.avg_bits:g}",
            row.rounding,
            str(row.seed),
            f"{row.accuracy:.1f}",
            f"{row.fitted:.4f}",
            f"{row.other:.4f}",
            f"{row.energy:.2g}",
            f"{row.error:.1f}",
            f"{row.share:.2%}",
        ]
        for row in rows
    ]
    notes = (
        f"{args.model}, bits by {METHOD}, batch-norm: {args.batchnorm}. Divergence from the float network in nat, on\n"
        f"the {SAMPLES} calibration images and on the other training images; S has {EIGENPAIRS} dimensions. Accuracy\n"
        f"on 1,000 test images.\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    main()
