"""Files: everything a run found out, in a folder that can be read without this package."""

from __future__ import annotations

import csv
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.gallery import Gallery, draw_gallery
from lightning_caq.reporting.html import write_html

if TYPE_CHECKING:
    from lightning_caq.plan import QuantizationPlan


def scalars(report: QuantizationReport, profile: CurvatureProfile) -> dict[str, float]:
    """Every number that is worth a curve, for any logger.

    Args:
        report: The report of a run.
        profile: What was measured; figures that were not measured are left out.

    Returns:
        ``caq/avg_bits``, ``caq/ratio``, ``caq/<variant>/<metric>``, and for each layer ``caq/bits/<layer>``,
        ``caq/kappa/<layer>`` and ``caq/lipschitz/<layer>``.

    Example:
        >>> from lightning_caq.report import LayerRow, Size
        >>> rows = (LayerRow("fc", "linear", 8, 8, None, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "avg_bits=2", rows, {"quantized": Size(2.0, 4.0, 8)}, {})
        >>> scalars(report, CurvatureProfile(()))
        {'caq/avg_bits': 2.0, 'caq/ratio': 4.0, 'caq/bits/fc': 2.0}
    """
    size = report.sizes["quantized"]
    values: dict[str, float | None] = {"avg_bits": size.avg_bits, "ratio": size.ratio, **report.metrics}
    values.update({f"bits/{row.name}": row.bits["quantized"] for row in report.layers})
    values.update({f"kappa/{row.name}": row.kappa for row in profile.layers})
    values.update({f"lipschitz/{row.name}": row.lipschitz for row in profile.layers})
    return {f"caq/{key}": float(value) for key, value in values.items() if value is not None}


def read_profile(directory: Path) -> CurvatureProfile | None:
    """The profile that an earlier run left in a folder; ``None`` if there is none that can be read."""
    try:
        return CurvatureProfile.from_json((directory / "profile.json").read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_outputs(
    directory: Path,
    plan: QuantizationPlan,
    profile: CurvatureProfile,
    report: QuantizationReport,
    gallery: Gallery | None = None,
) -> list[Path]:
    """Write the plan, the measurements, the report, a table of the layers, the figures, and one page with all of it.

    All files are written in full beside their place before the first one is moved there: where that fails, a full
    disk for one, no file is half written and those of an earlier run stay as they were.

    Args:
        directory: Where to write; made if it does not exist.
        plan: What was done to the network.
        profile: What was measured.
        report: What came of it.
        gallery: The figures, if they are drawn already.

    Returns:
        The files, sorted by name.

    Raises:
        OSError: If the folder cannot be written to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    gallery = gallery or draw_gallery(report, profile)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as scratch:
        folder = Path(scratch)
        plan.save(folder / "plan.json")
        (folder / "profile.json").write_text(profile.to_json() + "\n", encoding="utf-8")
        (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        _write_layers(folder / "layers.csv", profile, report)
        for tag, figure in gallery.figures.items():
            figure.savefig(folder / f"{tag}.png", dpi=150)
        write_html(folder / "report.html", report, profile, plan, gallery)
        written = [directory / path.name for path in sorted(folder.iterdir())]
        for path in written:
            os.replace(folder / path.name, path)
    for tag in gallery.missing:  # a picture of an earlier run would be taken for one of this run
        (directory / f"{tag}.png").unlink(missing_ok=True)
    return written


def _write_layers(path: Path, profile: CurvatureProfile, report: QuantizationReport) -> None:
    """One row a layer; what was measured for several bit-widths takes a column a bit-width."""
    measured = {row.name: _cells(row) for row in profile.layers}
    rows = [
        {
            "layer": row.name,
            "kind": row.kind,
            "weights": row.weights,
            "macs": row.macs,
            **{f"bits_{variant}": bits for variant, bits in row.bits.items()},
            **measured.get(row.name, {}),
        }
        for row in report.layers
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _cells(row: LayerCurvature) -> dict[str, Any]:
    """What was measured of a layer, column by column; an empty cell where it was not."""
    cells: dict[str, Any] = {}
    for name in (f.name for f in fields(row) if f.name not in ("name", "weights", "macs", "groups")):
        value = getattr(row, name)
        if isinstance(value, dict):
            cells.update({f"{name}_{bits}bit": figure for bits, figure in value.items()})
        else:
            cells[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return cells
