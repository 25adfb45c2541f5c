"""CAQ: errors of the layers, carried to the output (CAQ 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.measures.profile import CurvatureProfile


class Method:
    """Cost (A_i e_i(b))²: the square of the output error that layer i's rounding causes.

    e_i(b) is the measured error of the layer's output and A_i its amplification up to the network's output. The sum of
    the costs is Φ_rss², the composed error of independent layer errors (theory: composition of errors).

    Example:
        >>> from lightning_caq.measures.profile import LayerCurvature
        >>> row = LayerCurvature("fc", weights=1, channels=1, macs=1, output_error={2: 0.5}, amplification=4.0)
        >>> Method().costs(CurvatureProfile((row,)), [2])
        array([[4.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"output_error", "amplification"})

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = (A_i e_i(b))²."""
        return np.array(
            [[((row.amplification or 0.0) * row.output_error[b]) ** 2 for b in bits] for row in profile.layers]
        )
