"""docs/gallery.md and its pictures, from the files of two runs.

One is of the demo's CNN, the other of a ResNet-20 that was trained on CIFAR-10::

    python examples/01_callback.py --network cnn --log-dir build/demo
    python docs/scripts/gallery_resnet20.py build/gallery/resnet20
    python docs/scripts/gallery.py build/demo build/gallery/resnet20
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_pictures import newest_run

from lightning_caq.reporting.gallery import ENTRIES, Gallery, draw_gallery
from lightning_caq.reporting.runs import Run, read_run

DOCS = Path(__file__).resolve().parents[1]
IMAGES = DOCS / "images/gallery"


def told(run: Run) -> str:
    """On what a run was measured, in words."""
    assert run.report is not None
    assert run.profile is not None
    return (
        f"{len(run.report.layers)} layers at {run.report.budget}, curvature measured on {run.profile.samples} training "
        f"images and weights rounded on {run.report.options['calibration_samples']}"
    )


def page(galleries: dict[str, tuple[str, Gallery]], what: str) -> str:
    """The text of docs/gallery.md; ``galleries`` maps a folder of pictures to its caption and figures."""
    parts = [
        "# The figures, and how to read them",
        what,
        "In TensorBoard each is under `caq/` and its name here; `report.html` holds all of them on one page.",
    ]
    for entry in ENTRIES:
        parts += [f"## {entry.title} (`{entry.tag}`)", entry.reading]
        for folder, (caption, gallery) in galleries.items():
            picture = f"![{entry.title}: {caption}](images/gallery/{folder}/{entry.tag}.png)"
            shown = picture if entry.tag in gallery.figures else f"*Not drawn. {gallery.missing[entry.tag]}*"
            parts += [f"**{caption}**", shown]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the --log-dir that the demo was given")
    parser.add_argument("resnet20", type=Path, help="the folder that docs/scripts/gallery_resnet20.py was given")
    options = parser.parse_args()
    try:
        demo, resnet20 = read_run(newest_run(options.demo)), read_run(options.resnet20)
    except FileNotFoundError as error:
        sys.exit(str(error))
    runs = {"demo": ("The demo's CNN", demo), "resnet20": ("ResNet-20", resnet20)}
    galleries = {name: (caption, draw_gallery(run.report, run.profile)) for name, (caption, run) in runs.items()}
    for name, (_, gallery) in galleries.items():
        (IMAGES / name).mkdir(parents=True, exist_ok=True)
        for tag, figure in gallery.figures.items():
            figure.savefig(IMAGES / name / f"{tag}.png")
        print(f"{len(gallery.figures)} figures in {IMAGES / name}; not drawn: {gallery.missing or 'none'}")
    what = (
        f"Each figure is shown for two runs: the CNN that `make demo` trains on MNIST ({told(demo)}), and a ResNet-20 "
        f"trained on CIFAR-10 ({told(resnet20)}), whose last figure shows the same network trained anew on 2,000 "
        "images; `make figures` draws them."
    )
    (DOCS / "gallery.md").write_text(page(galleries, what), encoding="utf-8")


if __name__ == "__main__":
    main()
