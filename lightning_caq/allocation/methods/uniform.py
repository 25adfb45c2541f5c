"""Uniform: the same bits for every layer, as nearly as the budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.profile import CurvatureProfile


class Method:
    """Equal noise everywhere: cost n_i · 4^−b, the variance of uniform rounding noise on equal ranges.

    Under a whole number of average bits the optimum is that number in every layer; under a broken one the layers take
    the whole numbers on either side.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> profile = CurvatureProfile((LayerCurvature("fc", weights=16, channels=1, macs=16),))
        >>> Method().costs(profile, [1, 2])
        array([[4., 1.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = n_i 4^−b."""
        weights = np.array([row.weights for row in profile.layers], dtype=np.float64)
        return np.multiply.outer(weights, 0.25 ** np.asarray(bits, dtype=np.float64))
