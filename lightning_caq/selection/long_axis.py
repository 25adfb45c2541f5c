"""The valley: the steep directions of the objective, and the rounding of all layers that keeps out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_caq.measures.hessian.eigenvectors import short_axis_model
from lightning_caq.measures.hessian.validity import is_predicted
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.rounding.long_axis import round_long_axis
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel

_STIFFNESS = (1.0, 30.0, 900.0, 27_000.0)


@dataclass(frozen=True)
class Valley:
    """What long-axis rounding needs to know of the objective.

    Attributes:
        shape: The quadratic model at the float weights.
        objective: The objective on the samples that the model was measured on.
        reference: Its value at the float weights, nat.
    """

    shape: QuadraticModel
    objective: Objective
    reference: float

    def round(self, model: nn.Module, layers: Sequence[Layer], grids: Sequence[Grid]) -> list[Tensor]:
        """Codes for all layers, which are left in the network as its weights.

        With ``"distill"`` nothing is to be gained at the float weights, and |λ| is kept small. With ``"task"`` the
        gradient and negative eigenvalues promise a lower loss. They are followed only as far as the quadratic model
        tells what is then measured (CET Eq. 7): the price of ‖Δ‖² is raised until it does. If it never does, not
        even for codes that keep |λ| small, or nothing is gained, |λ| is kept small as before.

        Args:
            model: The float network.
            layers: Its layers.
            grids: Their grids.

        Returns:
            Codes, uint8 in the shapes of the weights.
        """
        weights = [layer_weight(model, layer).detach().clone() for layer in layers]
        plain = round_long_axis(weights, grids, self.shape.convex())
        change, valid = self._measure(model, layers, weights, grids, plain)
        if self.objective.name == "distill" or not valid:
            return plain
        for factor in _STIFFNESS:
            codes = round_long_axis(weights, grids, self.shape.stiffened(factor))
            lower, valid = self._measure(model, layers, weights, grids, codes)
            if valid and lower < change:
                return codes
        self._measure(model, layers, weights, grids, plain)
        return plain

    def _measure(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        weights: Sequence[Tensor],
        grids: Sequence[Grid],
        codes: Sequence[Tensor],
    ) -> tuple[float, bool]:
        """Write the values into the network; the change of the objective, and whether the model predicts it."""
        values = [grid.values(c).to(w) for w, grid, c in zip(weights, grids, codes, strict=True)]
        with torch.no_grad():
            for layer, value in zip(layers, values, strict=True):
                layer_weight(model, layer).copy_(value)
        delta = torch.cat([(v.double() - w.double()).flatten().cpu() for v, w in zip(values, weights, strict=True)])
        change = self.objective.value(model) - self.reference
        return change, is_predicted(change, self.shape.change(delta))


def find_valley(model: nn.Module, layers: Sequence[Layer], objective: Objective, k: int, seed: int) -> Valley:
    """Measure the ``k`` steepest directions of a float network; see ``short_axis_model`` for what it costs.

    Args:
        model: The float network, in eval mode.
        layers: The layers to round.
        objective: The objective on some samples.
        k: Number of eigenpairs.
        seed: Seed of the random starts and probes.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(4, 3), torch.randn(8, 4)
        >>> valley = find_valley(net, find_layers(net, x), make_objective("distill", net, [x]), k=2, seed=0)
        >>> valley.shape.vectors.shape
        torch.Size([12, 2])
    """
    with differentiable(model, layers):
        shape = short_axis_model(model, layers, objective, k, seed)
    return Valley(shape, objective, objective.value(model))
