"""Rounding of one layer to multiples of a step, its bits weighed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.rounding.moments import input_moments
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.quantizers.rounding.rate import distortion, refit_step, round_rate
from lightning_caq.quantizers.rounding.round_layer import corrected_weight
from lightning_caq.quantizers.rounding.trellis import SCALAR_STEP, round_trellis


@dataclass(frozen=True)
class StepRounding:
    """How layers are rounded to multiples of their steps.

    Attributes:
        looks: Whether the inputs of a layer are looked at: columns then absorb the errors of others, and the weight is
            corrected for the drift of its inputs.
        trellis: Whether codes are chosen on the trellis where inputs are looked at; scalar rounding takes a fraction
            of the time, and is what embeddings get in any case.
    """

    looks: bool = True
    trellis: bool = True

    def round(
        self, model: nn.Module, layer: Layer, step: float, passes: PairedPasses
    ) -> tuple[SteppedGrid, Tensor, float]:
        """Values and codes of one layer; the network is left as it is.

        Args:
            model: The network, the layers before this one rounded.
            layer: The layer.
            step: Its step on the trellis; scalar rounding takes one that makes about the same error.
            passes: The calibration batches in the network as it is and in the float one.

        Returns:
            The values, whose step is refitted to the codes; codes, int32 in the shape of the weight; and the mean
            squared error of a weight, see ``rate.distortion``.
        """
        weight = layer_weight(model, layer).detach()
        moments = input_moments(layer, weight, passes) if self.looks else None
        target = weight if moments is None else corrected_weight(layer, weight, moments)
        curvature = None if moments is None else moments.curvature.to(weight.device)
        matrices = to_matrix(layer, target.float())
        if curvature is not None and self.trellis:
            codes = round_trellis(matrices, curvature, step)
        else:
            step = SCALAR_STEP * step
            codes = round_rate(matrices, curvature, step)
        step = refit_step(matrices, codes, curvature, step)
        shape = (1,) * len(layer.shape)
        grid = SteppedGrid(
            torch.full(shape, step, dtype=torch.float32, device=weight.device),
            transposed=layer.groups if layer.transposed else 0,
        )
        error = distortion(matrices, step * codes, curvature)
        return grid, from_matrix(layer, codes.to(torch.int32)).contiguous(), error
