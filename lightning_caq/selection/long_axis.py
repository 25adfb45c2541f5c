"""Long-axis rounding of a network: all layers at once, such that their errors keep out of the steep directions."""

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
from lightning_caq.network.perturbed import replaced_weights
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.rounding.long_axis import round_long_axis
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel

_STIFFNESS = (1.0, 30.0, 900.0, 27_000.0)


@dataclass(frozen=True)
class LongAxisRounding:
    """What long-axis rounding needs to know of the objective.

    Attributes:
        shape: The quadratic model at the float weights.
        objective: The objective on the samples that the model was measured on.
        float_loss: Its value at the float weights, nat.
    """

    shape: QuadraticModel
    objective: Objective
    float_loss: float

    def codes(self, model: nn.Module, layers: Sequence[Layer], grids: Sequence[Grid]) -> list[Tensor]:
        """Codes for all layers.

        With ``"distill"`` nothing is to be gained at the float weights, and |λ| is kept small. With ``"task"`` the
        gradient and negative eigenvalues promise a lower loss. They are followed only as far as the quadratic model
        tells what is then measured (CET Eq. 7): the price of ‖Δ‖² is raised until it does. If it never does, not
        even for codes that keep |λ| small, or nothing is gained, |λ| is kept small as before.

        Args:
            model: The float network; left as it was.
            layers: Its layers.
            grids: Their grids.

        Returns:
            Codes, uint8 in the shapes of the weights.
        """
        weights = [layer_weight(model, layer).detach().clone() for layer in layers]
        careful = round_long_axis(weights, grids, self.shape.convex())
        if self.objective.name == "distill":
            return careful
        change, valid = self._change(model, layers, grids, careful)
        if not valid:
            return careful
        for factor in _STIFFNESS:
            codes = round_long_axis(weights, grids, self.shape.stiffened(factor))
            lower, valid = self._change(model, layers, grids, codes)
            if valid and lower < change:
                return codes
        return careful

    def _change(
        self, model: nn.Module, layers: Sequence[Layer], grids: Sequence[Grid], codes: Sequence[Tensor]
    ) -> tuple[float, bool]:
        """The change of the objective with these codes, nat, and whether the quadratic model predicts it."""
        weights = {layer.name: layer_weight(model, layer).detach() for layer in layers}
        rounded = {x.name: g.values(c).to(weights[x.name]) for x, g, c in zip(layers, grids, codes, strict=True)}
        delta = torch.cat([(rounded[n].double() - w.double()).flatten().cpu() for n, w in weights.items()])
        with replaced_weights(model, layers, rounded):
            change = self.objective.value(model) - self.float_loss
        return change, is_predicted(change, self.shape.change(delta))


def prepare_long_axis(
    model: nn.Module, layers: Sequence[Layer], objective: Objective, *, eigenpairs: int, seed: int
) -> LongAxisRounding:
    """Measure the steepest directions of a float network; see ``short_axis_model`` for what it costs.

    Args:
        model: The float network, in eval mode.
        layers: The layers to round.
        objective: The objective on some samples.
        eigenpairs: How many directions.
        seed: Seed of the random starts and probes.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(4, 3), torch.randn(8, 4)
        >>> objective = make_objective("distill", net, [x])
        >>> rounding = prepare_long_axis(net, find_layers(net, x), objective, eigenpairs=2, seed=0)
        >>> rounding.shape.vectors.shape
        torch.Size([12, 2])
    """
    with differentiable(model, layers):
        shape = short_axis_model(model, layers, objective, eigenpairs, seed)
    return LongAxisRounding(shape, objective, objective.value(model))
