"""TensorBoard: the figures, a summary, custom scalars and histograms of a run, under the tags ``caq/…``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport, markdown_table
from lightning_caq.reporting.gallery import Gallery, draw_gallery

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lightning_caq.plan import QuantizationPlan

MOST_HISTOGRAMS = 100
MOST_WEIGHTS = 2**18

# One chart a family: the tags of its curves begin so. Those of training come first: they alone have more than one step.
_FAMILIES = {
    "κ during training (out²/in²)": "caq/training/kappa/",
    "L during training (out/in)": "caq/training/lipschitz/",
    "trace during training (nat/weight²)": "caq/training/trace/",
    "top eigenvalue during training (nat/weight²)": "caq/training/top_eigenvalue/",
    "bits a weight": "caq/bits/",
    "κ (out²/in²)": "caq/kappa/",
    "L (out/in)": "caq/lipschitz/",
}


def log_to_tensorboard(
    writer: SummaryWriter,
    plan: QuantizationPlan,
    profile: CurvatureProfile,
    report: QuantizationReport,
    step: int,
    *,
    gallery: Gallery | None = None,
    floats: Mapping[str, Tensor] | None = None,
) -> None:
    """Write every figure, the text ``caq/summary``, the layout of the custom scalars and histograms of the weights.

    Scalars and hyperparameters are left to the caller, who logs them to every logger alike. Everything goes to the
    writer's own event file: ``add_scalars`` and ``add_hparams``, which open runs of their own, are not used.

    Args:
        writer: Where to write.
        plan: What was done to the network.
        profile: What was measured.
        report: What came of it.
        step: The training step at which it was done.
        gallery: The figures, if they are drawn already.
        floats: Layer name to weight before quantization, for histograms of before beside after.
    """
    for tag, figure in (gallery or draw_gallery(report, profile)).figures.items():
        writer.add_figure(f"caq/{tag}", figure, step)
    writer.add_text("caq/summary", summary(plan, profile, report), step)
    writer.add_custom_scalars(scalar_layout())
    _histograms(writer, plan, floats or {}, step)


def scalar_layout() -> dict[str, dict[str, list[Any]]]:
    """The layout of the Custom Scalars tab: one chart with the curves of all layers for each family of figures.

    Example:
        >>> scalar_layout()["caq"]["bits a weight"]
        ['Multiline', ['caq/bits/.*']]
    """
    return {"caq": {title: ["Multiline", [f"{re.escape(start)}.*"]] for title, start in _FAMILIES.items()}}


def _histograms(writer: SummaryWriter, plan: QuantizationPlan, floats: Mapping[str, Tensor], step: int) -> None:
    """Weights after quantization and, where they are given, before: of the 100 largest layers, 262,144 weights each."""
    largest = sorted(plan.layers, key=lambda x: x.codes.numel(), reverse=True)[:MOST_HISTOGRAMS]
    for layer in largest:
        sides = {"before": floats.get(layer.name), "after": layer.values}
        for side, weights in sides.items():
            if weights is not None and weights.numel():  # TensorBoard refuses an empty histogram
                flat = weights.detach().float().flatten().cpu()
                writer.add_histogram(f"caq/weights/{layer.name}/{side}", flat[:: -(-len(flat) // MOST_WEIGHTS)], step)


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
