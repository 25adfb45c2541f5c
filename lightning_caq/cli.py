"""The command line: look at runs and at quantized files, long after the network is gone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightning_caq.allocation.robustness import robustness
from lightning_caq.allocation.tradeoff import tradeoff
from lightning_caq.errors import CAQError, OptionError
from lightning_caq.evaluation.sweep import sweep_points, variant_metrics
from lightning_caq.export.sealed import read_sealed
from lightning_caq.report import QuantizationReport, text_table
from lightning_caq.reporting.figures.pareto import pareto
from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.reporting.html import write_comparison, write_html
from lightning_caq.reporting.runs import read_run
from lightning_caq.reporting.words import comparison
from lightning_caq.studies import SweepPoint


def report(log_dir: Path) -> None:
    """Draw the figures of a run again, and write them and report.html beside its files.

    Args:
        log_dir: The log folder of the run, or the folder caq in it.
    """
    run = read_run(log_dir)
    for name, problem in run.problems.items():
        print(f"{run.folder / name} {problem.rstrip('.')}.", file=sys.stderr)
    if run.report is None and run.profile is None and run.plan is None:
        raise FileNotFoundError(f"{run.folder} holds no file that can be used; nothing was written.")
    gallery = draw_gallery(run.report, run.profile)
    for tag, figure in gallery.figures.items():
        figure.savefig(run.folder / f"{tag}.png", dpi=150)
    path = write_html(run.folder / "report.html", run.report, run.profile, run.plan, gallery)
    if run.report is not None:
        print(run.report.table() + "\n")
    for reason in dict.fromkeys(gallery.missing.values()):
        print(f"not drawn: {', '.join(tag for tag, why in gallery.missing.items() if why == reason)}. {reason}")
    print(f"{len(gallery.figures)} figures and {path}")


def compare(log_dirs: list[Path], output: Path = Path("caq-compare.html")) -> None:
    """Lay several runs side by side: a table here, and a page with the table and a figure.

    Args:
        log_dirs: The log folders of the runs.
        output: Where to write the page.
    """
    runs: dict[str, QuantizationReport] = {}
    for name, log_dir in zip(_names(log_dirs), log_dirs, strict=True):
        run = read_run(log_dir)
        if run.report is None:
            raise FileNotFoundError(f"{run.folder / 'report.json'} {run.problems['report.json']}; nothing to compare.")
        runs[name] = run.report
    header, rows = comparison(runs)
    print(text_table(header, [[_text(cell) for cell in row] for row in rows]))
    points = [point for name, report in runs.items() for point in _points(name, report, alone=len(runs) == 1)]
    float_metrics = [variant_metrics(report, "float") for report in runs.values()]
    # A line for the float network makes sense only where all runs started from the same one.
    floats = float_metrics[0] if all(metrics == float_metrics[0] for metrics in float_metrics) else {}
    try:
        figure = pareto(points, floats)
    except ValueError as reason:
        figure = None
        print(f"no figure: {reason}")
    print(f"\n{write_comparison(output, runs, figure)}")


def allocate(log_dir: Path, method: str = "cet", avg_bits: float = 3.0, factor: float = 2.0) -> None:
    """Allocate bits anew from the profile of a run: what another size costs, and which bits an error would move.

    Args:
        log_dir: The log folder of the run, or the folder caq in it.
        method: A method that gives a table of costs.
        avg_bits: Average bits a weight.
        factor: By how much curvature and stretch of each layer are taken to be measured wrongly.
    """
    run = read_run(log_dir)
    if run.profile is None:
        raise FileNotFoundError(
            f"{run.folder / 'profile.json'} {run.problems['profile.json']}; nothing to allocate by."
        )
    bits = sorted(set.intersection(*(set(row.rounding_error) for row in run.profile.layers)))
    if not bits:
        raise OptionError(f"{run.folder / 'profile.json'} holds rounding errors of no bit-width; measure them first.")
    result = robustness(run.profile, method=method, bits=bits, avg_bits=avg_bits, factor=factor)
    draws = len(result.draws)
    print(f"{method} at {avg_bits:g} bits; curvature and stretch off by a factor of {factor:g} in {draws} draws")
    rows = [[name, str(b), f"{result.moved[name]:.0%}"] for name, b in result.bits.items()]
    print(text_table(["layer", "bits", "draws in which they move"], rows) + "\n")
    weights = sum(row.weights for row in run.profile.layers)
    points = tradeoff(run.profile, method=method, bits=bits)
    rows = [[f"{x.usage['size'] / weights:.3f}", f"{x.cost:.4g}", " ".join(map(str, x.bits))] for x in points]
    print(text_table(["average bits", "predicted cost", "bits of the layers"], rows))


def inspect(file: Path) -> None:
    """Print the layers, bits and bytes of a quantized network that was saved with save_quantized.

    Args:
        file: The safetensors file.
    """
    description, tensors = read_sealed(file)
    rows, codes, total = [], 0, 0
    for layer in description["layers"]:
        count = 1
        for side in layer["shape"]:
            count *= side
        size = sum(x.nbytes for name, x in tensors.items() if name.rpartition(".")[0] == layer["key"])
        code_bytes = tensors[f"{layer['key']}.codes"].nbytes
        bits = 8 * code_bytes / count if f"{layer['key']}.widths" in tensors else layer["bits"]
        codes, total = codes + code_bytes, total + count
        shape = "x".join(map(str, layer["shape"]))
        rows.append([layer["key"], f"{bits:.3g}", f"{count:,}", shape, f"{size:,}"])
    print(text_table(["weight", "bits", "numbers", "shape", "bytes with scales"], rows))
    stored = sum(x.nbytes for x in tensors.values())
    print(
        f"\n{description['network']}: {len(rows)} quantized weights, {total:,} numbers in {codes:,} bytes of codes, "
        f"{8 * codes / max(total, 1):.2f} bits each. With scales, zero points and all other tensors {stored:,} bytes; "
        f"the file has {file.stat().st_size:,}."
    )


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-caq report``, ``compare``, ``allocate`` or ``inspect``.

    Args:
        args: The arguments; those of the command line by default.

    Raises:
        SystemExit: With a message instead of a traceback, where files cannot be read or are not what they should be.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        sys.exit("lightning-caq needs jsonargparse for its command line: pip install 'jsonargparse[signatures]'")
    parser = ArgumentParser(prog="lightning-caq", description=__doc__)
    choices = parser.add_subcommands(required=True)
    for name, command in _COMMANDS.items():
        what = (command.__doc__ or "").splitlines()[0]
        subparser = ArgumentParser(description=what)
        if command is compare:
            subparser.add_argument("log_dirs", nargs="+", type=Path, help="the log folders of the runs")
            subparser.add_argument(
                "--output", type=Path, default=Path("caq-compare.html"), help="where to write the page"
            )
        else:
            subparser.add_function_arguments(command, as_positional=True)
        choices.add_subcommand(name, subparser, help=what)
    chosen = parser.parse_args(args)
    try:
        _COMMANDS[chosen.subcommand](**chosen[chosen.subcommand])
    except (CAQError, OSError) as error:
        sys.exit(f"lightning-caq: {error}")


_COMMANDS: dict[str, Callable[..., None]] = {
    "report": report,
    "compare": compare,
    "allocate": allocate,
    "inspect": inspect,
}


def _names(log_dirs: list[Path]) -> list[str]:
    """Short names of folders: without the parts that all of them share."""
    parts = [path.resolve().parts for path in log_dirs]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    names = ["/".join(p[shared if len(parts) > 1 else -1 :]) for p in parts]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _points(name: str, report: QuantizationReport, alone: bool) -> list[SweepPoint]:
    """The networks of one run, as curves of their own beside those of other runs."""
    points = (*sweep_points(report), *report.studies.points)
    return [point if alone else replace(point, method=f"{name}: {point.method}") for point in points]


def _text(cell: str | float | None) -> str:
    return cell if isinstance(cell, str) else "–" if cell is None else f"{cell:.4g}"
