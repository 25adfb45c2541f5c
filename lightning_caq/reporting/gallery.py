"""The gallery: every figure of a run under its tag, and the reason for each that cannot be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from lightning_caq.evaluation.loss_gap import loss_gaps
from lightning_caq.evaluation.shares import error_shares, subspace_shares
from lightning_caq.evaluation.sweep import sweep_points, variant_metrics
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.figures.bits import bits_heatmap
from lightning_caq.reporting.figures.curvature import curvature_bars
from lightning_caq.reporting.figures.eigenpairs import eigenpair_curve
from lightning_caq.reporting.figures.kappa_vs_bits import kappa_vs_bits
from lightning_caq.reporting.figures.landscape import loss_landscape
from lightning_caq.reporting.figures.last_bit import last_bits
from lightning_caq.reporting.figures.loss_gap import loss_gap
from lightning_caq.reporting.figures.pareto import pareto
from lightning_caq.reporting.figures.rate_distortion import rate_distortion
from lightning_caq.reporting.figures.spectrum import spectrum
from lightning_caq.reporting.figures.subspace import subspace
from lightning_caq.reporting.figures.tightness import tightness_curves
from lightning_caq.reporting.figures.training import training_curves
from lightning_caq.reporting.figures.waterfall import error_waterfall


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery.

    Attributes:
        tag: Its tag, ``caq/<tag>`` in TensorBoard.
        title: What it is called.
        reading: How to read it, in three sentences.
        needs: What of a run it is drawn from: ``"report"``, ``"profile"``.
        draw: Draws it; raises ``ValueError`` with the reason where the run does not hold what it needs.
    """

    tag: str
    title: str
    reading: str
    needs: tuple[str, ...]
    draw: Callable[[QuantizationReport, CurvatureProfile], Figure]


@dataclass(frozen=True)
class Gallery:
    """The figures of a run.

    Attributes:
        figures: Tag to figure, in the order of ``ENTRIES``.
        missing: Tag to the reason why there is no figure.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def draw_gallery(report: QuantizationReport | None, profile: CurvatureProfile | None) -> Gallery:
    """Draw every figure for which a run holds the data.

    Args:
        report: The report of a run, if there is one.
        profile: What was measured, if it is known.

    Returns:
        The figures, and for each of the others why it is not there.

    Example:
        >>> gallery = draw_gallery(None, CurvatureProfile((), eigenvalues=(2.0, 1.0)))
        >>> list(gallery.figures), gallery.missing["bits"]
        (['spectrum'], 'There is no report.')
    """
    gallery = Gallery()
    parts: Mapping[str, object] = {"report": report, "profile": profile}
    for entry in ENTRIES:
        absent = [part for part in entry.needs if parts[part] is None]
        if absent:
            gallery.missing[entry.tag] = f"There is no {' and no '.join(absent)}."
            continue
        try:
            gallery.figures[entry.tag] = entry.draw(report or _NO_REPORT, profile or _NO_PROFILE)
        except ValueError as reason:
            gallery.missing[entry.tag] = str(reason)
    return gallery


# Stand-ins for a part that an entry does not look at.
_NO_REPORT = QuantizationReport("", "", (), {}, {})
_NO_PROFILE = CurvatureProfile(())


def _bits(report: QuantizationReport) -> dict[str, int | float]:
    return {row.name: row.bits["quantized"] for row in report.layers if "quantized" in row.bits}


def _floats(report: QuantizationReport) -> dict[str, float]:
    return variant_metrics(report, "float")


ENTRIES = (
    Entry(
        "bits",
        "Bits of every layer",
        "Each row is a layer, from the first at the top to the last; each column is a way to quantize the network, "
        "and the number in a cell, like its colour, is the bits a weight of that layer has. Read across a row to see "
        "where the method departs from the others, and down a column to see which parts of the network it protects. "
        "Above each column stand its average bits, how much smaller it is than float32, and its accuracy: columns are"
        " worth comparing where their sizes agree.",
        ("report",),
        lambda report, profile: bits_heatmap(report),
    ),
    Entry(
        "last_bit",
        "What the last bit of each layer bought",
        "Each row is a layer with its bits: the filled mark is the damage that the method predicts its last step to "
        "have taken away for each kilobyte, the ring what the next step would. Bits go where they buy most, so filled "
        "marks lie right of the rings of all layers as far as steps are fine enough. This is what bits were chosen by, "
        "where κ and L only describe a layer.",
        ("report",),
        lambda report, profile: last_bits(report.reasons),
    ),
    Entry(
        "pareto",
        "Accuracy against size",
        "Each point is a quantized network, each curve a method, and the dashed line the float network; further up "
        "(or down, for a loss) and to the left is better. Where one curve lies above another, its method makes better"
        " use of the same bits; error bars show how much of that is chance, and without them a small difference may be "
        "nothing else. The ring marks the network that the plan is for.",
        ("report",),
        lambda report, profile: pareto((*sweep_points(report), *report.studies.points), _floats(report)),
    ),
    Entry(
        "rate_distortion",
        "Bits, error, and the limit",
        "On the left each point is a network that was tried on the way to the size that was asked for: its error at "
        "the output against the bits a weight that its codes take. The grey line is what no code of these weights can "
        "go below; the distance across is what better codes could still save. On the right the bars are the bits of "
        "every layer and the marks its own limit: long bars belong to layers whose steps are small against their "
        "weights.",
        ("report",),
        lambda report, profile: rate_distortion(report.rate_limit),
    ),
    Entry(
        "curvature",
        "Curvature and bits of every layer",
        "The bars show κ, how sharply the output energy of each layer bends with its input, on a logarithmic axis, "
        "with the tolerance of its iteration as a whisker. The numbered points, on the axis above, are the bits that "
        "the layer was given. κ describes a layer by itself and is not what bits were chosen by, so points need not "
        "follow the bars.",
        ("report", "profile"),
        curvature_bars,
    ),
    Entry(
        "kappa_vs_bits",
        "κ against bits",
        "Each point is a layer, with its κ across and its bits up; points that would hide each other are moved apart "
        "a little. The rank correlation above says in one number whether layers with larger κ got more bits: +1 "
        "always, 0 no relation, −1 the reverse. The numbered layers are those that are furthest out of rank, the "
        "first to look at if an allocation surprises you.",
        ("report", "profile"),
        kappa_vs_bits,
    ),
    Entry(
        "error_waterfall",
        "Where the output error comes from",
        "Each bar is the error that rounding one layer is predicted to cause at the network's output, the largest "
        "first, and each starts where the one before ends, so that they add up in the last row. A point at the "
        "end of its bar says that the prediction agrees with what was seen when only that layer was rounded; short of"
        " it the prediction was too large, beyond it too small. The layers at the top are those on which the next bit "
        "is best spent.",
        ("report", "profile"),
        lambda report, profile: error_waterfall(error_shares(profile, _bits(report), report.studies.alone)),
    ),
    Entry(
        "tightness",
        "Predicted against observed output error",
        "All layers are rounded to the same bit-width, or to the plan's (hollow marks), biases are corrected for the "
        "mean of each layer's error, and the error of the output (black) is compared with predictions of it. On the "
        "right the same as ratios: a bound must lie above 1, an estimate should lie near 1."
        " The closer the lines, the more an error budget that is set on them can be trusted.",
        ("report",),
        lambda report, profile: _tightness(report),
    ),
    Entry(
        "loss_gap",
        "How far the quadratic model holds",
        "On the left each point is one layer rounded alone: the change of the loss that was measured, against the "
        "change that the quadratic model predicts; in the grey band the two agree. On the right the numbers are bit-"
        "widths, placed at the length of their rounding error, and the bar of a layer ends at its validity radius. "
        "Crosses and bold numbers are outside: the allocation used the measured change there instead of the model's.",
        ("profile",),
        lambda report, profile: loss_gap(loss_gaps(profile)),
    ),
    Entry(
        "spectrum",
        "Spectrum of the Hessian",
        "On the left are the eigenvalues of the loss's Hessian, the steepest first, and in the middle, where it was "
        "measured, the density of all: a few large ones before a long tail, or beside a peak at zero, mean that "
        "rounding errors hurt in a few directions only. Where negative ones appear, the loss is a "
        "saddle, and some rounding errors would lower it. On the right is the share of that curvature in each layer; "
        "a bar far beyond its point belongs to a layer that is more sensitive than its size.",
        ("profile",),
        lambda report, profile: spectrum(profile),
    ),
    Entry(
        "subspace",
        "Rounding errors in the steep directions",
        "For each layer the blue marks are the rounding error's energy in the steep (short-axis) directions and the "
        "orange ones the energy outside them; rings are nearest rounding, filled marks the rounding that was chosen. "
        "A line that runs to the left is energy that the chosen rounding saved. The percentages are the share of the "
        "steep directions in the whole.",
        ("report", "profile"),
        lambda report, profile: subspace(subspace_shares(profile, _bits(report), report.studies.energies)),
    ),
    Entry(
        "landscape",
        "The loss around the network",
        "The colours are the loss on a plane through the float weights, which are at the ring: across is the steepest"
        " direction, up a flat one along which most of the rounding error lies. The path rounds one layer after the "
        "other and ends at the square, the quantized network. It should run along the valley: steps to the side are "
        "what costs loss.",
        ("report",),
        lambda report, profile: _landscape(report),
    ),
    Entry(
        "eigenpairs",
        "How many eigenpairs it takes",
        "Each point is the network quantized with another number of eigenpairs, at the same budget. Where the curve "
        "goes flat, more of them do not change the result. The dashed line is the float network.",
        ("report",),
        lambda report, profile: eigenpair_curve(report.studies.eigenpairs, _floats(report)),
    ),
    Entry(
        "training",
        "Curvature during training",
        "Each panel is a measure and each line a layer: how sharply its output energy bends (κ), how far it can "
        "stretch its input (L), and how sharply the loss bends with its weights (trace and top eigenvalue). Lines "
        "that still rise or fall at the end say that an allocation made earlier would have been another one. Layers "
        "that stay on top throughout are those that need bits whenever training is stopped.",
        ("report",),
        lambda report, profile: training_curves(report.studies.training),
    ),
)


def _tightness(report: QuantizationReport) -> Figure:
    size = report.sizes.get("quantized")
    plan = (size.avg_bits, report.tightness) if size and report.tightness else None
    return tightness_curves(report.studies.tightness, plan)


def _landscape(report: QuantizationReport) -> Figure:
    if report.studies.landscape is None:
        raise ValueError("The loss was not computed on a plane; study=True does that.")
    return loss_landscape(report.studies.landscape)
