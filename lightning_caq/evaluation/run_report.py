"""The report of a run, put together from what the steps of it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from lightning_caq.evaluation.reasons import reasons
from lightning_caq.evaluation.versions import versions
from lightning_caq.network.layers import Layer
from lightning_caq.notes import Note
from lightning_caq.options import QuantizationOptions
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import Certainty, LayerRow, OutputError, QuantizationReport, Size
from lightning_caq.scores import Score, log_ratio
from lightning_caq.selection.select import Selection
from lightning_caq.sizes import FLOAT_BITS, LayerSizes
from lightning_caq.studies import RateLimit, Studies, Tightness


def run_report(
    options: QuantizationOptions,
    layers: Sequence[Layer],
    sizes: LayerSizes,
    *,
    profile: CurvatureProfile,
    selection: Selection,
    float_metrics: Mapping[str, Score],
    tightness: Tightness | None,
    studies: Studies,
    limit: RateLimit | None = None,
    seconds: Mapping[str, float],
    notes: Sequence[Note] = (),
) -> QuantizationReport:
    """Float against quantized, with sizes.

    Args:
        options: What was asked for.
        layers: The layers that were quantized.
        sizes: Their sizes.
        profile: What was measured of them.
        selection: The networks that were made.
        float_metrics: Metrics of the float network by name.
        tightness: Predicted and observed output errors; ``None`` where there are no bit-widths to predict for.
        studies: What else was computed to understand the result.
        limit: Bits of entropy-coded layers beside their limit.
        seconds: Step to the seconds it took.
        notes: What the reader should know, ahead of the notes on measuring and on the networks.
    """
    plans = {variant: candidate.plan for variant, candidate in selection.candidates.items()}
    metrics = {"float": float_metrics, **{v: candidate.metrics for v, candidate in selection.candidates.items()}}
    total = sum(sizes.weights) + sizes.unquantized
    return QuantizationReport(
        method=selection.chosen.plan.method,
        budget=str(options.budget),
        layers=_rows(layers, profile, selection),
        sizes={
            "float": Size(float(FLOAT_BITS), 1.0, total * FLOAT_BITS // 8),
            **{v: Size(plan.avg_bits, plan.ratio, plan.bytes, plan.memory_ratio) for v, plan in plans.items()},
        },
        metrics={f"{variant}/{name}": float(x) for variant, values in metrics.items() for name, x in values.items()},
        certainty=certainty(metrics),
        output_errors=_output_errors(selection),
        reasons=reasons(options.method, profile, options.bits, selection.chosen.plan),
        predicted_loss={
            v: x for v, plan in plans.items() if plan.widths and (x := profile.predicted_loss(plan.widths)) is not None
        },
        options=options.to_dict(),
        versions=versions(),
        seconds=dict(seconds),
        notes=(*notes, *_sampling_note(profile), *selection.notes, *_limit_note(limit)),
        tightness=tightness,
        rate_limit=limit,
        studies=studies,
    )


BEFORE = "before training on"
"""The variant that the quantized network was until it was trained on."""

RETRAINED = Note(
    "The quantized network was trained on; its metrics are those after that, and all else is as measured before."
)

T = TypeVar("T")


def retrained_report(report: QuantizationReport, metrics: Mapping[str, Score]) -> QuantizationReport:
    """The report of a quantized network that was trained on after the run, which it has before and after.

    Args:
        report: The report of the run, or of the last time that the network was trained on.
        metrics: Metrics of the network as it is now.

    Example:
        >>> report = QuantizationReport("cet", "avg_bits=3", (), {}, {"float/acc": 0.9, "quantized/acc": 0.7})
        >>> retrained_report(report, {"acc": Score(0.8)}).metrics
        {'float/acc': 0.9, 'before training on/acc': 0.7, 'quantized/acc': 0.8}
    """
    earlier, sure, sizes = report.metrics, report.certainty, report.sizes
    if BEFORE not in sizes:  # what the run gave; it stays if the network is trained on once more
        earlier, sure = _as_before(earlier), _as_before(sure)
        sizes = {**sizes, **({BEFORE: sizes["quantized"]} if "quantized" in sizes else {})}
    certain = {
        f"quantized/{name}": Certainty(score.samples, score.stderr)
        for name, score in metrics.items()
        if score.samples is not None and score.stderr is not None
    }
    now = {f"quantized/{name}": float(score) for name, score in metrics.items()}
    return replace(
        report,
        metrics=_of_others(earlier) | now,
        certainty=_of_others(sure) | certain,
        sizes=sizes,
        notes=tuple(dict.fromkeys((*report.notes, RETRAINED))),
    )


def _as_before(known: Mapping[str, T]) -> dict[str, T]:
    """What is known of the quantized network, under the name that it has once that was trained on."""
    mine = "quantized/"
    return {(f"{BEFORE}/{k.removeprefix(mine)}" if k.startswith(mine) else k): x for k, x in known.items()}


def _of_others(known: Mapping[str, T]) -> dict[str, T]:
    return {name: x for name, x in known.items() if not name.startswith("quantized/")}


def certainty(metrics: Mapping[str, Mapping[str, Score]]) -> dict[str, Certainty]:
    """How sure each network's metrics are, and the differences from each of the other networks'.

    Args:
        metrics: Variant to metrics by name; those of which nothing but the value is known are left out.

    Returns:
        ``<variant>/<metric>`` to certainty.

    Example:
        >>> scores = {"float": {"acc": Score.of_samples([1.0] * 9)}, "quantized": {"acc": Score.of_samples([1.0] * 9)}}
        >>> certainty(scores)["quantized/acc"]
        Certainty(samples=9, stderr=0.0, differences={'float': 0.0})
    """
    known: dict[str, Certainty] = {}
    for variant, values in metrics.items():
        for name, score in values.items():
            if score.samples is None or score.stderr is None:
                continue
            others = {v: x[name] for v, x in metrics.items() if v != variant and name in x}
            stderrs = {v: score.less(other).stderr for v, other in others.items()}
            paired = {v: x for v, x in stderrs.items() if x is not None}
            known[f"{variant}/{name}"] = Certainty(score.samples, score.stderr, paired)
    return known


def _output_errors(selection: Selection) -> dict[str, OutputError]:
    chosen = selection.chosen
    return {
        variant: OutputError(x.error, None if x is chosen else log_ratio(x.distances, chosen.distances))
        for variant, x in selection.candidates.items()
    }


def _rows(layers: Sequence[Layer], profile: CurvatureProfile, selection: Selection) -> tuple[LayerRow, ...]:
    bits = {variant: candidate.plan.bits for variant, candidate in selection.candidates.items()}
    inputs = {variant: candidate.plan.activation_bits for variant, candidate in selection.candidates.items()}
    return tuple(
        LayerRow(
            name=layer.name,
            kind=layer.kind,
            weights=layer.weights,
            macs=layer.macs,
            kappa=profile[layer.name].kappa,
            lipschitz=profile[layer.name].lipschitz,
            bits={variant: by_layer[layer.name] for variant, by_layer in bits.items()},
            input_bits={
                variant: by_layer[layer.name] for variant, by_layer in inputs.items() if layer.name in by_layer
            },
        )
        for layer in layers
    )


def _limit_note(limit: RateLimit | None) -> tuple[Note, ...]:
    if limit is None:
        return ()
    return (
        Note(
            f"Codes take {limit.bits:.2f} bits a weight; no code of weights with these densities takes fewer than "
            f"{limit.limit:.2f} at this error (Shannon's lower bound), a gap of {limit.gap:.2f}."
        ),
    )


def _sampling_note(profile: CurvatureProfile) -> tuple[Note, ...]:
    if profile.sampled is None:
        return ()
    drawn, of = profile.sampled
    return (
        Note(
            f"Curvature rests on {drawn:,} output rows drawn at random of {of:,}: traces and quadratic forms are "
            "unbiased, eigenvalues are estimates."
        ),
    )
