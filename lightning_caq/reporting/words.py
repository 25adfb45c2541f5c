"""Words: a run told in plain sentences, in columns, and as the configuration that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_caq.evaluation.sweep import variant_metrics
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.report import QuantizationReport, as_factor, in_figures
from lightning_caq.reporting.metrics import headline_metric, smaller_is_better
from lightning_caq.scores import Difference, LogRatio
from lightning_caq.studies import LayerReason


def in_words(report: QuantizationReport) -> list[str]:
    """What was done, what it gave, and how it compares: one sentence or two each.

    Example:
        >>> from lightning_caq.report import LayerRow, Size
        >>> sizes = {"float": Size(32.0, 1.0, 4000), "quantized": Size(3.0, 10.0, 400)}
        >>> metrics = {"float/val_acc": 0.92, "quantized/val_acc": 0.91}
        >>> rows = (LayerRow("fc", "linear", 1000, 1000, None, None, {"quantized": 3}),)
        >>> for sentence in in_words(QuantizationReport("cet", "avg_bits=3", rows, sizes, metrics)):
        ...     print(sentence)
        1 layer was quantized by cet at avg_bits=3: 3.00 bits a weight on average, 3 to 3 a layer. With scales, ...
        val_acc is 0.91, against 0.92 of the float network (a change of −0.01).
        Quantization is simulated: weights lie on their grids, arithmetic is in floating point.
    """
    size = report.sizes.get("quantized")
    if size is None:
        return ["The report holds no quantized network."]
    bits = [row.bits["quantized"] for row in report.layers if "quantized" in row.bits]
    spread = f", {min(bits):.3g} to {max(bits):.3g} a layer" if bits else ""
    layers = "1 layer was" if len(report.layers) == 1 else f"{len(report.layers)} layers were"
    told = [
        f"{layers} quantized by {report.method} at {report.budget}: {size.avg_bits:.2f} bits a weight on "
        f"average{spread}. With scales, zero points and layers left in float32 the weights take "
        f"{size.bytes / 1000:,.1f} kB, {size.ratio:.1f} times less than in float32."
    ]
    if inputs := [row.input_bits["quantized"] for row in report.layers if "quantized" in row.input_bits]:
        told.append(f"Inputs of layers are rounded too, to {min(inputs)} to {max(inputs)} bits.")
    metric = headline_metric(report.metric_names)
    if metric is not None:
        told += _metric_in_words(report, metric)
    if (predicted := report.predicted_loss.get("quantized")) is not None:
        told.append(
            f"From the curvature alone, for weights rounded to nearest, a loss change of {predicted:.3g} nat was "
            "predicted."
        )
    if (held := report.tightness) is not None:
        told.append(
            f"With the plan's bits and nearest rounding the output is off by {held.observed:.3g} (its own unit, rms "
            "over samples). Φ, the errors of all layers carried to the output and added as if they all pointed the "
            f"same way, is {held.ratios['bound']:.2f} times as much; their signed first-order sum is "
            f"{held.ratios['linear']:.2f} times."
        )
    told.append("Quantization is simulated: weights lie on their grids, arithmetic is in floating point.")
    return told


def _metric_in_words(report: QuantizationReport, metric: str) -> list[str]:
    values = {v: found[metric] for v in report.variants if metric in (found := variant_metrics(report, v))}
    if "quantized" not in values:
        return []
    mine = values.pop("quantized")
    told = f"{metric} is {mine:.4g}"
    sure = report.certainty.get(f"quantized/{metric}")
    if sure is not None:
        told += f" ± {sure.stderr:.2g} on {sure.samples:,} samples"
    if "float" in values:
        before = values.pop("float")
        difference = report.difference("quantized", "float", metric)
        change = f"a change of {mine - before:+.2g}".replace("-", "−") if mine != before else "no change"
        if difference is not None and difference.stderr is not None:
            change = f"{in_figures(difference)}, {_verdict(difference)}"
        told += f", against {before:.4g} of the float network ({change})"
    told += "."
    if values:
        better = min if smaller_is_better(metric) else max
        best = better(values, key=lambda v: values[v])
        told += f" The best of the networks it was compared with, {best}, has {values[best]:.4g}"
        difference = report.difference(best, "quantized", metric)
        if difference is not None and difference.stderr is not None:
            told += f" ({in_figures(difference)} from the quantized one, {_verdict(difference)})"
        told += "."
    return [told, *_errors_in_words(report)]


def _verdict(difference: Difference | LogRatio) -> str:
    """Whether a difference can be told from none."""
    limit = "2 standard errors, paired by samples"
    return f"within noise: less than {limit}" if difference.within_noise else f"more than {limit}"


def _errors_in_words(report: QuantizationReport) -> list[str]:
    """How the output errors of the compared networks stand to that of the quantized one."""
    ratios = {v: x.ratio for v, x in report.output_errors.items() if x.ratio is not None and x.ratio.stderr is not None}
    if not ratios:
        return []
    listed = "; ".join(f"{v} {as_factor(x)} ({_verdict(x)})" for v, x in ratios.items())
    samples = next(iter(ratios.values())).samples
    return [
        f"Errors of the output as multiples of the quantized network's, sample by sample on {samples:,} calibration "
        f"samples that nothing was fitted to: {listed}. Every sample counts here, so that networks can be told apart "
        "whose other metrics agree."
    ]


def reason_in_words(reason: LayerReason) -> str:
    """Why a layer has its bits, in one sentence.

    Example:
        >>> reason_in_words(LayerReason("fc", "cet", "nat", 3, 2, 4, 1.0, 5.0, 0.5, 8000, "modelled"))
        'fc has 3 bits: cet predicts 1 nat of damage (modelled); at 2 bits it would be 5, so that the last step bought
        4 nat/kB; at 4 bits it would be 0.5, and the next step would buy 0.5 nat/kB.'
    """
    bits = f"{reason.name} has {reason.bits:.3g} bits"
    if reason.damage is None:
        why = {
            "searched": f"{reason.method} chose those of all layers together, by a search, not by a cost of each",
            "uniform": "all layers have the same bits, as nearly as the budget allows",
        }
        return f"{bits}: {why.get(reason.source, f'{reason.method} predicts nothing of it alone')}."
    unit, rate = (f" {reason.unit}", f" {reason.unit}/kB") if reason.unit else ("", " a kB")
    told = f"{bits}: {reason.method} predicts {reason.damage:.2g}{unit} of damage ({reason.source})"
    if reason.fewer is None or reason.damage_fewer is None or reason.bought is None:
        told += "; there is no smaller width"
    else:
        told += f"; at {reason.fewer:.3g} bits it would be {reason.damage_fewer:.2g}, so that the last step bought "
        told += f"{reason.bought:.2g}{rate}"
    if reason.more is None or reason.damage_more is None or reason.next is None:
        return f"{told}; there is no larger width."
    return (
        f"{told}; at {reason.more:.3g} bits it would be {reason.damage_more:.2g}, and the next step would buy "
        f"{reason.next:.2g}{rate}."
    )


def reasons_in_words(report: QuantizationReport) -> list[str]:
    """How the bits came about as a whole: what steps bought that were taken, and would buy that were not."""
    known = [reason for reason in report.reasons if reason.damage is not None]
    if not known:
        return []
    told = (
        f"Bits follow from the damage that {known[0].method} predicts for each layer at each width, within the budget."
    )
    if report.method != known[0].method:
        told = f"Bits are those of {report.method}; the damage is what {known[0].method} predicts of them."
    bought, more = ([x for r in known if (x := getattr(r, name)) is not None] for name in ("bought", "next"))
    if bought and more:
        unit = f" {known[0].unit}/kB" if known[0].unit else " a kB"
        told += (
            f" The last steps bought {min(bought):.2g}{unit} or more, further ones would buy {max(more):.2g} at most."
        )
    return [f"{told} κ and L are measures of a layer by itself and not what its bits were chosen by."]


def layer_columns(
    report: QuantizationReport | None, profile: CurvatureProfile | None
) -> tuple[list[str], list[list[str | float | None]]]:
    """Header and rows of the table of layers: what is known of each, columns of which nothing is known left out.

    Example:
        >>> layer_columns(None, CurvatureProfile((LayerCurvature("fc", 8, 2, 8, kappa=3.0),)))
        (['layer', 'weights', 'MACs', 'κ (out²/in²)'], [['fc', 8, 8, 3.0]])
    """
    measured = {row.name: row for row in profile.layers} if profile else {}
    rows: list[dict[str, Any]] = []
    chosen = report.method if report else ""  # goes by "quantized" alone
    why = {reason.name: reason for reason in report.reasons} if report else {}
    for row in report.layers if report else ():
        line = {"layer": row.name, "kind": row.kind, "weights": row.weights, "MACs": row.macs}
        for what, found in (("bits", row.bits), ("input bits", row.input_bits)):
            line |= {what if v == "quantized" else f"{what}, {v}": b for v, b in found.items() if v != chosen}
        line |= _why(why.get(row.name))
        line |= {"κ (out²/in²)": row.kappa, "L (out/in)": row.lipschitz}
        rows.append(line | _measured(measured.get(row.name), row.bits.get("quantized")))
    if report is None:
        rows = [
            {"layer": x.name, "weights": x.weights, "MACs": x.macs, **_measured(x, None)} for x in measured.values()
        ]
    columns = [
        c for c in dict.fromkeys(c for line in rows for c in line) if any(line.get(c) is not None for line in rows)
    ]
    return columns, [[line.get(column) for column in columns] for line in rows]


def _why(reason: LayerReason | None) -> dict[str, str | float | None]:
    """What the method predicts of a layer, column by column."""
    if reason is None or reason.damage is None:
        return {}
    unit = f" ({reason.unit})" if reason.unit else ""
    return {
        f"predicted damage{unit}": reason.damage,
        f"a width less{unit}": reason.damage_fewer,
        f"a width more{unit}": reason.damage_more,
        f"last step bought{unit and f' ({reason.unit}/kB)'}": reason.bought,
        "by": reason.source,
    }


def _measured(row: LayerCurvature | None, bits: float | None) -> dict[str, float | None]:
    if row is None:
        return {}
    found = {
        "κ (out²/in²)": row.kappa,
        "L (out/in)": row.lipschitz,
        "trace (nat/weight²)": row.trace,
        "A (gain to the output)": row.amplification,
    }
    if isinstance(bits, int):  # of an average nothing was measured
        found["ΔᵀHΔ / 2 (nat)"] = 0.5 * row.second_order[bits] if bits in row.second_order else None
        found["output error e"] = row.output_error.get(bits)
    return found


def comparison(runs: Mapping[str, QuantizationReport]) -> tuple[list[str], list[list[str | float | None]]]:
    """Header and rows of the table of all networks of several runs, each run's float network once.

    Example:
        >>> from lightning_caq.report import Size
        >>> sizes = {"quantized": Size(3.0, 10.0, 400)}
        >>> report = QuantizationReport("cet", "avg_bits=3", (), sizes, {"quantized/val_acc": 0.91})
        >>> comparison({"a": report})[1]
        [['a', 'quantized (cet)', 'avg_bits=3', 3.0, 10.0, 0.4, 0.91]]
    """
    names = list(dict.fromkeys(name for report in runs.values() for name in report.metric_names))
    header = ["run", "network", "budget", "avg bits", "ratio", "kB", *names]
    rows: list[list[str | float | None]] = []
    for run, report in runs.items():
        for variant in report.variants:
            size, metrics = report.sizes[variant], variant_metrics(report, variant)
            measured = [metrics.get(name) for name in names]
            budget = "" if variant == "float" else report.budget
            rows.append([run, report.title(variant), budget, size.avg_bits, size.ratio, size.bytes / 1000, *measured])
    return header, rows
