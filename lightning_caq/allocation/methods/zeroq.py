"""ZeroQ: how far the outputs move when one layer is rounded (Cai et al. 2020, "ZeroQ", sensitivity Ω)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost KL(outputs of the float network ‖ outputs with only layer i at b bits), mean over samples, in nat.

    Nothing is modelled: every layer is rounded at every bit-width and the network is run. ZeroQ measures on images it
    synthesises; here the calibration samples are used, as for every other method.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, kl={2: 0.5, 4: 0.125})
        >>> Method().costs(CurvatureProfile((row,)), [2, 4])
        array([[0.5  , 0.125]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"kl"})
    unit: ClassVar[str] = "nat"
    measured: ClassVar[bool] = True
    in_nat: ClassVar[bool] = True

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = KL with only layer i at b bits."""
        return layer_table(profile, "kl", bits)
