"""Rounding errors: what nearest rounding does to a layer's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.grids.values import AFFINE, Quantizer, Values
from lightning_caq.sizes import W

_SECONDS = 1.2e-7  # that the grid of a weight and bit-width takes


@dataclass(frozen=True)
class NearestErrors(Mapping[W, Tensor], Generic[W]):
    """Δ(b) = Q_b(W) − W of one weight by bit-width, each made when it is looked up.

    What is held takes a byte a weight and bit-width.

    Attributes:
        weight: W, a copy.
        grids: The values that W is rounded to, by bit-width.
        codes: Which of them is nearest to each weight, uint8, by bit-width.
    """

    weight: Tensor
    grids: Mapping[W, Values]
    codes: Mapping[W, Tensor]

    def __getitem__(self, bits: W) -> Tensor:
        """Δ(b), in the shape and type of the weight."""
        error: Tensor = self.grids[bits].values(self.codes[bits]) - self.weight
        return error.to(self.weight.dtype)

    def __iter__(self) -> Iterator[W]:
        """The bit-widths."""
        return iter(self.grids)

    def __len__(self) -> int:
        """Number of bit-widths."""
        return len(self.grids)


def nearest_errors(
    model: nn.Module, layer: Layer, bits: Sequence[W], quantizer: Quantizer = AFFINE
) -> NearestErrors[W]:
    """Δ_i(b) = Q_b(W_i) − W_i for every bit-width, in the shape of the weight.

    Costs are built from nearest rounding even where error feedback rounds later: feedback makes the error of a single
    layer small, and a sum of such errors understates what many layers at few bits do together.

    Example:
        >>> net = nn.Linear(4, 4)
        >>> errors = nearest_errors(net, Layer("", "linear", (4, 4)), [2, 8])
        >>> bool(errors[2].norm() > errors[8].norm())
        True
    """
    weight = layer_weight(model, layer).detach().clone()
    quantizer = quantizer.of_layer(layer)
    grids = {b: quantizer.fit(weight, b, layer.channel_shape) for b in bits}
    return NearestErrors(weight, grids, {b: grid.codes(weight).to(torch.uint8) for b, grid in grids.items()})


def weight_range(model: nn.Module, layer: Layer) -> float:
    """Root mean square over output channels of max − min of a layer's weights.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 3.0], [-2.0, 2.0]]))
        >>> weight_range(net, Layer("", "linear", (2, 2)))  # √((3² + 4²) / 2)
        3.53...
    """
    weight = layer_weight(model, layer).detach().double()
    axis = 1 if layer.transposed else 0
    rows = weight.movedim(axis, 0).flatten(1)
    return float((rows.amax(1) - rows.amin(1)).square().mean().sqrt())


def profile_quantizer(profile: CurvatureProfile) -> Quantizer:
    """The values that a profile's rounding errors are errors from."""
    return Quantizer(
        profile.quantizer,
        profile.range,
        profile.symmetry,
        group_size=profile.group_size,
        scale_dtype=profile.scale_dtype,
    )


def layer_errors(measurement: Measurement) -> dict[str, NearestErrors[int]]:
    """Δ_i(b) of this process's layers at every bit-width, by layer name."""
    m = measurement
    return {x.name: nearest_errors(m.model, x, m.bits, m.quantizer) for x in m.rank_layers}


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """‖Δ_i(b)‖² and the range of the weights."""
    errors, layers = measurement.once(layer_errors), {x.name: x for x in measurement.rank_layers}

    def fill(row: LayerCurvature) -> LayerCurvature:
        squares = {b: float(d.double().square().sum()) for b, d in errors[row.name].items()}
        return replace(row, rounding_error=squares, weight_range=weight_range(measurement.model, layers[row.name]))

    return profile.with_rows(fill)


MEASURE = Measure(
    "rounding_error",
    step="rounding errors",
    take=take,
    cost=lambda extent: Cost(seconds=_SECONDS * extent.weights * extent.bits),
)
