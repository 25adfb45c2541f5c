"""Sweeps: networks quantized under different settings, as points that can be compared and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_caq.studies import SweepPoint

if TYPE_CHECKING:
    from lightning_caq.report import QuantizationReport


def sweep_points(report: QuantizationReport) -> tuple[SweepPoint, ...]:
    """The quantized networks of one run, the chosen one first.

    Example:
        >>> from lightning_caq.report import QuantizationReport, Size
        >>> sizes = {"float": Size(32.0, 1.0, 8), "quantized": Size(3.0, 10.0, 1)}
        >>> report = QuantizationReport("cet", "avg_bits=3", (), sizes, {"float/acc": 0.9, "quantized/acc": 0.8})
        >>> [(p.method, p.avg_bits, p.metrics) for p in sweep_points(report)]
        [('cet', 3.0, {'acc': 0.8})]
    """
    return tuple(
        SweepPoint(
            method=report.method if variant == "quantized" else variant,
            avg_bits=size.avg_bits,
            ratio=size.ratio,
            metrics=variant_metrics(report, variant),
            eigenpairs=int(report.options.get("eigenpairs", 0)),
            chosen=variant == "quantized",
        )
        for variant, size in ((v, report.sizes[v]) for v in report.variants if v != "float")
    )


def variant_metrics(report: QuantizationReport, variant: str) -> dict[str, float]:
    """Metric to value of one network of a run.

    Example:
        >>> from lightning_caq.report import QuantizationReport
        >>> variant_metrics(QuantizationReport("cet", "", (), {}, {"float/acc": 0.9, "uniform/acc": 0.8}), "float")
        {'acc': 0.9}
    """
    return {key.split("/", 1)[1]: value for key, value in report.metrics.items() if key.startswith(f"{variant}/")}


def mean_points(points: Iterable[SweepPoint]) -> tuple[SweepPoint, ...]:
    """One point for all networks of a method at the same average bits, with standard errors.

    Bits are the same if they agree to a hundredth. A metric that one of the networks lacks, or has as NaN, is averaged
    over the others.

    Example:
        >>> points = mean_points([SweepPoint("cet", 3.0, 10.0, {"acc": x}) for x in (0.8, 0.9, 1.0)])
        >>> [(round(p.metrics["acc"], 3), round(p.stderr["acc"], 4)) for p in points]  # 0.1 / √3
        [(0.9, 0.0577)]
    """
    groups: dict[tuple[str, float, int], list[SweepPoint]] = {}
    for point in points:
        groups.setdefault((point.method, round(point.avg_bits, 2), point.eigenpairs), []).append(point)
    return tuple(_mean(group) for group in groups.values())


def _mean(group: Sequence[SweepPoint]) -> SweepPoint:
    if len(group) == 1:
        return group[0]
    means, errors = {}, {}
    for name in dict.fromkeys(name for point in group for name in point.metrics):
        values = [v for point in group if not math.isnan(v := point.metrics.get(name, math.nan))]
        if not values:
            continue
        mean = means[name] = sum(values) / len(values)
        if len(values) > 1:
            variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            errors[name] = math.sqrt(variance / len(values))
    return replace(group[0], metrics=means, stderr=errors, chosen=any(point.chosen for point in group))


def eigenpair_sweep(
    run: Callable[[int], QuantizationReport], counts: Sequence[int] = (50, 100, 200, 500)
) -> tuple[SweepPoint, ...]:
    """The quantized network by the number of eigenpairs that it was allocated with (CET figure 3).

    Costs one whole run a count; no run is faster than ``run`` makes it.

    Args:
        run: Quantizes the network with so many eigenpairs and reports; it must leave the network as it was.
        counts: The numbers of eigenpairs.

    Returns:
        One point a count, in the order of ``counts``.

    Example:
        >>> from lightning_caq.report import QuantizationReport, Size
        >>> def run(k):
        ...     sizes = {"quantized": Size(3.0, 10.0, 1)}
        ...     return QuantizationReport("cet", "", (), sizes, {"quantized/distill": 1 / k}, options={"eigenpairs": k})
        >>> [(p.eigenpairs, p.metrics["distill"]) for p in eigenpair_sweep(run, (1, 2))]
        [(1, 1.0), (2, 0.5)]
    """
    return tuple(
        replace(point, eigenpairs=count) for count in counts for point in sweep_points(run(count)) if point.chosen
    )
