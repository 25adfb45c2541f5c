"""docs/gallery.md and its pictures, from a real run.

By default a ResNet-20 that was trained on CIFAR-10 is measured, quantized at several budgets and studied; with
``--log-dir`` the pictures are those of a run that is there already::

    python docs/gallery.py
    python docs/gallery.py --log-dir demo_logs/cnn/version_0
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from networks import DATA, accuracy, load_cifar10, load_network

from lightning_caq import measure, quantize
from lightning_caq.evaluation.report import QuantizationReport
from lightning_caq.evaluation.sweep import sweep_points
from lightning_caq.measures.profile import CurvatureProfile
from lightning_caq.pipeline import QuantizationResult
from lightning_caq.progress import Progress
from lightning_caq.reporting.gallery import ENTRIES, Gallery, draw_gallery
from lightning_caq.reporting.runs import read_run

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images/gallery"
BITS = (2, 3, 4, 5, 6, 8)
OTHER_BUDGETS = (2.25, 3.0, 4.0)
# What the methods and a studied run need, and the spectral density, which takes longer than all else.
NEEDS = frozenset(
    {
        "kappa", "lipschitz", "inputs", "trace", "rounding_error", "output_error", "amplification", "subspace",
        "loss_change", "density",
    }
)  # fmt: skip


def resnet20(
    data: Path, samples: int, calibration: int, avg_bits: float
) -> tuple[QuantizationReport, CurvatureProfile]:
    """Quantize a ResNet-20 and study it, and quantize it at other budgets too."""
    model, (train, test) = load_network("resnet20", data), load_cifar10(data)
    batches = train.sample(calibration, seed=0).batches(128)

    profile = measure(model, batches, needs=NEEDS, bits=BITS, samples=samples, progress=Progress(print))

    def run(bits: float, study: bool = False) -> QuantizationResult:
        return quantize(
            model, batches, avg_bits=bits, calibration_samples=calibration, curvature_samples=samples, study=study,
            compare=("uniform", "caq"), profile=profile, evaluate=lambda net: {"test_acc": accuracy(net, test)},
            inplace=False, say=print,
        )  # fmt: skip

    result = run(avg_bits, study=True)
    others = [run(bits).report for bits in OTHER_BUDGETS]
    points = tuple(replace(point, chosen=False) for report in others for point in sweep_points(report))
    studies = replace(result.report.studies, points=points)
    return replace(result.report, studies=studies), profile


def page(gallery: Gallery, told: str) -> str:
    """The text of docs/gallery.md."""
    parts = [
        "# The figures, and how to read them",
        told,
        "In TensorBoard each is under `caq/` and its name here; `report.html` holds all of them on one page.",
    ]
    for entry in ENTRIES:
        parts += [f"## {entry.title} (`{entry.tag}`)"]
        if entry.tag in gallery.figures:
            parts += [f"![{entry.title}](images/gallery/{entry.tag}.png)"]
        else:
            parts += [f"*Not drawn for this run. {gallery.missing[entry.tag]}*"]
        parts += [entry.reading]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run or read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of cifar10_small.npz and resnet20_cifar10.th")
    parser.add_argument("--samples", type=int, default=64, help="images that curvature is measured on")
    parser.add_argument("--calibration", type=int, default=512, help="images that weights are rounded on")
    parser.add_argument("--avg-bits", type=float, default=2.5)
    parser.add_argument("--log-dir", type=Path, help="draw this run instead")
    options = parser.parse_args()
    try:
        if options.log_dir:
            run = read_run(options.log_dir)
            report, profile, what = run.report, run.profile, f"the run in `{options.log_dir}`"
        else:
            report, profile = resnet20(options.data, options.samples, options.calibration, options.avg_bits)
            what = (
                f"a ResNet-20 trained on CIFAR-10, curvature measured on {profile.samples} training images and weights "
                f"rounded on {options.calibration}"
            )
    except FileNotFoundError as error:
        sys.exit(str(error))
    command = shlex.join(["python", "docs/gallery.py", *sys.argv[1:]])
    gallery = draw_gallery(report, profile)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for tag, figure in gallery.figures.items():
        figure.savefig(IMAGES / f"{tag}.png")
    (DOCS / "gallery.md").write_text(page(gallery, f"All pictures are of {what} (`{command}`)."))
    print(f"{len(gallery.figures)} figures in {IMAGES}; not drawn: {gallery.missing or 'none'}")


if __name__ == "__main__":
    main()
