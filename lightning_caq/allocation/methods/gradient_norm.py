"""Gradient norm: more bits for layers whose loss gradient is larger (CAQ proposal, 4.2, baseline 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost ‖g_i‖ · ‖Δ_i(b)‖, in nat: by Cauchy and Schwarz no first-order change of the loss, g_iᵀ Δ_i, is larger.

    The common heuristic gives more bits to larger gradients; the rounding error turns it into a table. Under ``task``
    g_i is the gradient of the mean loss. Under ``distill`` that gradient is zero, as the float network is the minimum,
    and says nothing. The gradients of single samples are not zero: ‖g_i‖ is then the root mean square of
    ‖∇ log p(y)‖ over samples and labels y drawn from the network's own outputs, the norm that a task loss with these
    labels would show. It equals √tr(H_ii).

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, gradient_norm=3.0, rounding_error={2: 0.25})
        >>> Method().costs(CurvatureProfile((row,), objective="task"), [2])
        array([[1.5]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_norm", "rounding_error"})
    unit: ClassVar[str] = "nat"

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = ‖g_i‖ ‖Δ_i(b)‖."""
        norms = layer_column(profile, "gradient_norm" if profile.objective == "task" else "score_norm")
        costs: NDArray[np.float64] = norms[:, None] * np.sqrt(layer_table(profile, "rounding_error", bits))
        return costs
