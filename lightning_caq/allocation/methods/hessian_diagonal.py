"""Hessian diagonal: the quadratic model without its off-diagonal entries (CAQ proposal, 4.2, baseline 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost ½ Σ_j D_jj Δ_j², D the diagonal of the Hessian: as if rounding errors of two weights never acted together.

    D is the diagonal of the Gauss–Newton matrix under ``distill``, in nat. Under ``task`` it is that of the empirical
    Fisher matrix, the usual stand-in (Kunstner, Balles and Hennig 2019 say how far it is one), in nat². The saliency
    ½ H_jj δ_j² is that of Optimal Brain Damage (LeCun, Denker and Solla 1990).

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, diagonal_energy={2: 3.0, 4: 0.5})
        >>> Method().costs(CurvatureProfile((row,)), [2, 4])
        array([[1.5 , 0.25]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = ½ Σ_j D_jj Δ_j²."""
        return 0.5 * layer_table(profile, "diagonal_energy", bits)
