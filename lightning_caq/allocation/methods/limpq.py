"""LIMPQ: learned quantizer scales as importance (Tang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost s_i(b), the learned scale of a quantizer of layer i at b bits, in the unit of the weights.

    "Mixed-Precision Neural Network Quantization via Learned Layer-wise Importance" learns the scales of all layers and
    bit-widths together and minimises their sum over the layers, sizes left out of it. Here the scales are trained for a
    few dozen steps with fixed weights (``scale_importance``), where the paper trains an epoch with the weights: near
    their start they say little more than how large the weights are.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, scale_importance={2: 0.5, 4: 0.125})
        >>> Method().costs(CurvatureProfile((row,)), [2, 4])
        array([[0.5  , 0.125]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scale_importance"})

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = s_i(b)."""
        return layer_table(profile, "scale_importance", bits)
