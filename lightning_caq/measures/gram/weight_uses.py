"""Weight uses: whether a weight acts in its modules' calls alone, or is used by functions too, or changed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_caq.measures.gram.layer_calls import Pass, call_factors, put_factors
from lightning_caq.measures.gram.row_forms import DenseRows
from lightning_caq.network.layer_matrix import to_matrix
from lightning_caq.network.layers import Layer, layer_modules, layer_weight, requiring_gradients
from lightning_caq.utilities.seeding import generator

_TOLERANCE = 1e-2


def matrix_shape(layer: Layer) -> tuple[int, int, int]:
    """Groups, outputs and columns of the layer as matrices; an embedding's rows are its words."""
    outputs = layer.shape[1] if layer.transposed else layer.shape[0] // layer.groups
    return layer.groups, outputs, layer.weights // (layer.groups * outputs)


def unaccounted(model: nn.Module, layers: Sequence[Layer], sample: Any) -> set[str]:
    """Layers whose weight acts otherwise than its modules' calls tell: it is used by a function too, or changed first.

    The gradient of a random sum of the outputs by the weight is compared with what the calls make of it.

    Args:
        model: The network; the weights of the layers require gradients.
        layers: The layers.
        sample: A sample, or a batch that cannot be cut.

    Returns:
        Their names.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, 2 * self.weight)
        >>> net = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2))
        >>> layers = [Layer(n, "linear", (2, 2), calls=1, modules=(n,)) for n in "01"]
        >>> unaccounted(net, layers, torch.ones(1, 2))
        {'1'}
    """
    if not layers:  # a process may have none of its own
        return set()
    watched = {id(m): layer for layer in layers for m in layer_modules(model, layer)}
    weights = [layer_weight(model, layer) for layer in layers]
    with requiring_gradients(weights):
        run = Pass.over(model, watched, sample)
        if not run.outputs.values.requires_grad:
            return set()
        seed = torch.randn(run.outputs.values.shape, generator=generator(0, "uses")).to(run.outputs.values)
        outputs = [y for _, _, _, y in run.calls]
        gradients = torch.autograd.grad(run.outputs.values, [*outputs, *weights], seed, allow_unused=True)
    found = set()
    with torch.no_grad():
        for layer, weight, truth in zip(layers, weights, gradients[len(outputs) :], strict=True):
            every = range(matrix_shape(layer)[1])
            dense = DenseRows(1, *matrix_shape(layer), weight.dtype, weight.device)
            for (owner, module, x, _), g in zip(run.calls, gradients, strict=False):
                if owner is layer and g is not None:
                    try:
                        put_factors(dense, slice(0, 1), every, [call_factors(layer, module, x, g, 1)])
                    except (RuntimeError, IndexError):
                        found.add(layer.name)
            expected = torch.zeros_like(weight) if truth is None else truth
            rows = dense.rows.reshape(to_matrix(layer, expected).shape)
            error = (rows - to_matrix(layer, expected)).norm()
            if error > _TOLERANCE * max(float(expected.norm()), float(rows.norm())):
                found.add(layer.name)
    return found
