"""The run of docs/gallery.md on a ResNet-20: measured, quantized at several budgets, studied, and its training watched.

python docs/scripts/gallery_resnet20.py build/gallery/resnet20
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import torch.nn.functional as F
from networks import BLOCKS, DATA, Images, ResNet, accuracy, load_cifar10, load_network

from lightning_caq import measure, quantize
from lightning_caq.bridge.monitoring import MONITORED
from lightning_caq.evaluation.sweep import sweep_points
from lightning_caq.pipeline import QuantizationResult
from lightning_caq.reporting.files import write_outputs
from lightning_caq.studies import EpochCurvature
from lightning_caq.utilities.progress import Progress

BITS = (2, 3, 4, 5, 6, 8)
AVG_BITS, OTHER_BUDGETS = 2.5, (2.25, 3.0, 4.0)
SAMPLES, CALIBRATION = 64, 512
EPOCHS, WATCHED = 8, 32
# What the methods and a studied run need.
NEEDS = frozenset(
    {
        "kappa", "lipschitz", "inputs", "trace", "rounding_error", "output_error", "amplification", "subspace",
        "loss_change", "density",
    }
)  # fmt: skip


def quantized(data: Path) -> QuantizationResult:
    """Quantize the trained network and study it, and quantize it at other budgets too."""
    model, (train, test) = load_network("resnet20", data), load_cifar10(data)
    batches = train.sample(CALIBRATION, seed=0).batches(128)
    profile = measure(model, batches, needs=NEEDS, bits=BITS, samples=SAMPLES, progress=Progress(print))

    def run(bits: float, study: bool = False) -> QuantizationResult:
        return quantize(
            model, batches, avg_bits=bits, calibration_samples=CALIBRATION, curvature_samples=SAMPLES, study=study,
            compare=("uniform", "caq"), profile=profile, evaluate=lambda net: {"test_acc": accuracy(net, test)},
            inplace=False, say=print,
        )  # fmt: skip

    result = run(AVG_BITS, study=True)
    others = [run(bits).report for bits in OTHER_BUDGETS]
    points = tuple(replace(point, chosen=False) for report in others for point in sweep_points(report))
    studies = replace(result.report.studies, points=points)
    return replace(result, profile=profile, report=replace(result.report, studies=studies))


def watched(train: Images) -> tuple[EpochCurvature, ...]:
    """Train the same network from nothing for a few epochs, and measure it after each."""
    torch.manual_seed(0)
    model, samples = ResNet(BLOCKS["resnet20"]), train.sample(WATCHED, seed=0).batches(WATCHED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    found = []
    for epoch in range(EPOCHS):
        model.train()
        for x, y in train.sample(len(train), seed=epoch).batches(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        rows = measure(model.eval(), samples, needs=MONITORED, samples=WATCHED).layers
        figures = {f"{name}/{row.name}": getattr(row, name) for row in rows for name in sorted(MONITORED)}
        found.append(EpochCurvature(epoch, figures))
        print(f"epoch {epoch}: {accuracy(model, train):.1f}% of the training images")
    return tuple(found)


def main() -> None:
    """Measure, quantize, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files of the run go")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of cifar10_small.npz and resnet20_cifar10.th")
    options = parser.parse_args()
    try:
        train, _ = load_cifar10(options.data)
        result = quantized(options.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    report = replace(result.report, studies=replace(result.report.studies, training=watched(train)))
    write_outputs(options.folder, result.plan, result.profile, report)


if __name__ == "__main__":
    main()
