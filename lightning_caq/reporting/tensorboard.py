"""TensorBoard: the figures and a summary of a run, under the tags ``caq/…``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_caq.evaluation.report import QuantizationReport, markdown_table
from lightning_caq.measures.profile import CurvatureProfile
from lightning_caq.reporting.figures import bits_heatmap, curvature_bars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lightning_caq.plan import QuantizationPlan


def log_to_tensorboard(
    writer: SummaryWriter,
    plan: QuantizationPlan,
    profile: CurvatureProfile,
    report: QuantizationReport,
    step: int,
) -> None:
    """Write the figures ``caq/bits`` and ``caq/curvature`` and the text ``caq/summary``.

    Scalars are left to the caller, who logs them to every logger alike. Everything goes to the writer's own event
    file: ``add_scalars`` and ``add_hparams``, which open runs of their own, are not used.

    Args:
        writer: Where to write.
        plan: What was done to the network.
        profile: What was measured.
        report: What came of it.
        step: The training step at which it was done.
    """
    writer.add_figure("caq/bits", bits_heatmap(report), step)
    writer.add_figure("caq/curvature", curvature_bars(report, profile), step)
    writer.add_text("caq/summary", summary(plan, profile, report), step)


def summary(plan: QuantizationPlan, profile: CurvatureProfile, report: QuantizationReport) -> str:
    """What was done and what it gave, in Markdown: a few sentences, the networks compared, and the layers."""
    repairs = f", and {len(plan.repairs)} repaired statistics and biases" if plan.repairs else ""
    done = (
        f"**{len(plan.layers)} layers were quantized to {plan.avg_bits:.2f} bits a weight on average, "
        f"{plan.ratio:.1f} times smaller than float32** (scales and zero points counted). Bits were allocated by "
        f"`{plan.method}` under `{plan.budget}`; weights were rounded by `{plan.rounding}`{repairs}."
    )
    reading = (
        "κ is the layer's second-order sensitivity (out²/in²) and L its Lipschitz constant (out/in), measured on "
        f"{profile.samples:,} samples. Quantization is simulated: weights lie on their grids, arithmetic is float."
    )
    notes = [f"- {note}" for note in report.notes]
    parts = [done, markdown_table(*report.variant_cells()), reading, markdown_table(*report.layer_cells())]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])
