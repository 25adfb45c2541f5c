"""Eigenvectors: the short-axis subspace with every weight's part in it, as a quadratic model of the objective.

Measuring needs no eigenvector (``spectrum``); choosing what single weights are rounded to does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_caq.errors import OptionError
from lightning_caq.measures.gram.pieces import passes
from lightning_caq.measures.gram.spectrum import gram_spectrum, rows_memory
from lightning_caq.measures.gram.weight_rows import weight_rows
from lightning_caq.measures.gram.weight_uses import matrix_shape
from lightning_caq.measures.hessian.hutchinson import estimate_layer_traces
from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs, residual_curvature
from lightning_caq.network.layer_matrix import from_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel
from lightning_caq.utilities.seeding import generator

LARGEST = 2**31  # bytes


def check_memory(layers: Sequence[Layer], k: int) -> None:
    """Refuse eigenvectors that take too much memory: 4 n k bytes for n weights and k eigenpairs.

    Args:
        layers: The layers.
        k: Number of eigenpairs.

    Raises:
        OptionError: If they take more than ``LARGEST`` bytes.

    Example:
        >>> check_memory([Layer("fc", "linear", (100, 100))], k=64)
    """
    n = sum(layer.weights for layer in layers)
    size = 4 * n * min(k, n)
    if size > LARGEST:
        fits = max(LARGEST // (4 * n), 1)
        raise OptionError(
            f"rounding='long_axis' with eigenpairs={k} holds {size / 2**30:.1f} GiB of eigenvectors for {n:,} weights, "
            f"more than {LARGEST / 2**30:.1f}; give eigenpairs={fits} or fewer, or another rounding."
        )


def short_axis_model(model: nn.Module, layers: Sequence[Layer], target: Objective, k: int, seed: int) -> QuadraticModel:
    """The leading eigenpairs of the objective's Hessian, its mean curvature outside them, and the gradient.

    Takes one pass over gradient rows for the spectrum and one for the vectors with ``"distill"``, Lanczos and a trace
    estimate with ``"task"``; 4 n k bytes for the vectors.

    Args:
        model: The float network, in eval mode, its layers' weights differentiable.
        layers: The layers.
        target: The objective; ``"distill"`` has no gradient at the float weights.
        k: Number of eigenpairs; fewer are given where the Hessian has fewer.
        seed: Seed of the random starts and probes.

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net = nn.Linear(2, 1, bias=False)
        >>> layer, x = Layer("", "linear", (1, 2), calls=1, modules=("",)), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> shape = short_axis_model(net, [layer], make_objective("distill", net, [x]), k=1, seed=0)
        >>> shape.vectors.abs().flatten(), round(float(shape.values), 4), round(shape.residual, 4)
        (tensor([0., 1.]), 2.0, 0.5)
    """
    check_memory(layers, k)
    route = _from_rows if target.name == "distill" else _from_products
    return route(model, layers, target, k, seed)


def _from_rows(model: nn.Module, layers: Sequence[Layer], target: Objective, k: int, seed: int) -> QuadraticModel:
    """v_j = Aᵀ u_j / √λ_j, with the rows of A held for a few layers at a time."""
    spectrum = gram_spectrum(model, layers, target.batches, {x.name: {} for x in layers}, k=k, seed=seed, exact=True)
    values = spectrum.values[:k]
    mix = spectrum.combinations[:, :k] / values.sqrt()
    sizes = tuple(layer.weights for layer in layers)
    vectors = torch.zeros(sum(sizes), len(values), dtype=torch.float32)
    edges = dict(zip([x.name for x in layers], pairwise(torch.tensor([0, *sizes]).cumsum(0).tolist()), strict=True))
    memory = rows_memory(layer_weight(model, layers[0]))
    for pieces in passes(model, layers, target.batches, len(mix), memory):
        parts = weight_rows(model, pieces, target.batches, spectrum.chosen)
        while parts:
            piece, rows = parts.popitem()  # let go before the next pass fills memory
            start, stop = edges[piece.layer.name]
            vectors[start:stop][_places(piece.layer)[:, piece.cut].flatten()] = rows.combine(mix).float().cpu()
    outside = residual_curvature(spectrum.trace, values, sum(sizes))
    return QuadraticModel(sizes, values, vectors, outside, torch.zeros(sum(sizes)))


def _places(layer: Layer) -> Tensor:
    """Of each entry of the layer's matrices its place in the flat weight, shape (groups, outputs, columns)."""
    shape = matrix_shape(layer)
    entry_of = from_matrix(layer, torch.arange(layer.weights).reshape(shape)).flatten()
    return entry_of.argsort().reshape(shape)


def _from_products(model: nn.Module, layers: Sequence[Layer], target: Objective, k: int, seed: int) -> QuadraticModel:
    with folded_hessian(model, layers, target) as hessian:
        pairs = leading_pairs(hessian, k, seed)
        traces = estimate_layer_traces(hessian, [generator(seed, f"trace/{x.name}") for x in layers])
        gradient = torch.cat([part.flatten() for part in hessian.gradient()])
    vectors, values = pairs.vectors.float().cpu(), pairs.values.cpu()
    outside = residual_curvature(float(traces.values.sum()), values, hessian.size)
    return QuadraticModel(tuple(hessian.sizes), values, vectors, outside, gradient.float().cpu())
