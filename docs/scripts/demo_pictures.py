"""The pictures of README.md, drawn from the files of the demo's run.

python docs/scripts/demo_pictures.py demo_logs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.reporting.runs import read_run

IMAGES = Path(__file__).resolve().parents[1] / "images"
SHOWN = ("bits", "curvature", "error_waterfall")


def newest_run(log_dir: Path) -> Path:
    """The folder of the last run of the demo's CNN."""
    reports = sorted(log_dir.glob("cnn/*/caq/report.json"), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise FileNotFoundError(
            f"{log_dir} holds no run of the CNN: python examples/01_callback.py --log-dir {log_dir}"
        )
    return reports[-1].parent


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_dir", type=Path, help="the --log-dir that the demo was given")
    try:
        run = read_run(newest_run(parser.parse_args().log_dir))
    except FileNotFoundError as error:
        sys.exit(str(error))
    gallery = draw_gallery(run.report, run.profile)
    missing = {tag: gallery.missing[tag] for tag in SHOWN if tag in gallery.missing}
    if missing:
        sys.exit(f"{run.folder} lacks what its pictures show: {missing}")
    for tag in SHOWN:
        gallery.figures[tag].savefig(IMAGES / f"{tag}.png")
    print(f"{', '.join(SHOWN)} of {run.folder} are in {IMAGES}")


if __name__ == "__main__":
    main()
