"""Top eigenvalues: the steepest direction inside each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.gram.output_rows import OutputRow, choose_rows
from lightning_caq.measures.gram.pieces import passes
from lightning_caq.measures.gram.weight_rows import weight_rows
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.krylov import Krylov
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.utilities.seeding import generator


def top_eigenvalues(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_steps: int = 40,
    dropped: float = 1e-4,
    max_rows: int = 2048,
    memory: int = 2**30,
) -> dict[str, tuple[float, float]]:
    """λ_max(H_ii): the eigenvalue of largest magnitude of every layer's own block, with its sign; nat/weight².

    By Lanczos on all layers in step. For ``task`` on per-layer products, which share one graph: at most ``max_steps``
    of them, and ``max_steps`` · n numbers of memory. For ``distill`` on the per-layer Gram matrices A_i A_iᵀ, one
    gradient a row of A; rows that are dropped can only lower it.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ.
        seed: Seed of the starting vectors.
        tolerance: Largest residual, relative to the eigenvalue.
        max_steps: Most products a layer.
        dropped: For ``distill``, share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: For ``distill``, most rows; of more, so many are drawn, and eigenvalues come out too high rather than
            too low.
        memory: For ``distill``, bytes that rows may take at a time.

    Returns:
        Layer name to eigenvalue and residual ‖H_ii v − λ v‖: an eigenvalue lies that close, above the tolerance where
        ``max_steps`` were too few. The value itself is as a rule far closer, by the square of the residual.

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> eigenvalues = top_eigenvalues(net, layers, make_objective("distill", net, [x]))
        >>> round(eigenvalues[""][0], 5)
        2.0
    """
    names = [layer.name for layer in layers]
    draws = [generator(seed, f"top/{name}") for name in names]
    if objective.name == "distill":
        rows = choose_rows(model, objective.batches, dropped, max_rows, seed=seed).rows
        grams = _grams(model, layers, rows, objective, memory)

        def products(vectors: list[Tensor]) -> list[Tensor]:
            return [gram @ v for gram, v in zip(grams, vectors, strict=True)]

        starts = [torch.randn(len(g), generator=draw).to(g) for g, draw in zip(grams, draws, strict=True)]
    else:
        operator = Hessian(model, layers, objective)
        shapes = [layer.shape for layer in layers]

        def products(vectors: list[Tensor]) -> list[Tensor]:
            images = operator.layer_products([v.reshape(s) for v, s in zip(vectors, shapes, strict=True)])
            return [image.flatten() for image in images]

        starts = [operator.like(torch.randn(n, generator=d)) for n, d in zip(operator.sizes, draws, strict=True)]
    return dict(zip(names, _largest(products, starts, tolerance, max_steps), strict=True))


def _grams(
    model: nn.Module, layers: Sequence[Layer], rows: Sequence[OutputRow], objective: Objective, memory: int
) -> list[Tensor]:
    """A_i A_iᵀ of every layer."""
    grams: dict[str, Tensor] = {}
    for pieces in passes(model, layers, objective.batches, len(rows), memory):
        for piece, piece_rows in weight_rows(model, pieces, objective.batches, rows).items():
            gram = piece_rows.gram().double().cpu()
            grams[piece.layer.name] = grams[piece.layer.name] + gram if piece.layer.name in grams else gram
    return [grams[layer.name] for layer in layers]


def _largest(
    products: Callable[[list[Tensor]], list[Tensor]], starts: list[Tensor], tolerance: float, max_steps: int
) -> list[tuple[float, float]]:
    """Of several operators, multiplied together, the eigenvalue of largest magnitude and its residual."""
    spaces = [Krylov(start, max_steps) for start in starts]
    pairs = [(0.0, float("inf"))] * len(spaces)
    while True:
        images = products([space.vector for space in spaces])
        done = True
        for i, (space, image) in enumerate(zip(spaces, images, strict=True)):
            value, residual = pairs[i]
            if space.ended or residual <= tolerance * abs(value):
                continue
            space.extend(image)
            values, vectors = torch.linalg.eigh(space.matrix())
            top = int(values.abs().argmax())
            pairs[i] = float(values[top]), space.beta * float(vectors[-1, top].abs())
            done = done and (space.ended or pairs[i][1] <= tolerance * abs(pairs[i][0]))
        if done:
            return pairs


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The top eigenvalue of every layer's block, and its residual."""
    m = measurement
    pairs = top_eigenvalues(m.model, m.rank_layers, m.objective, seed=m.seed)

    def fill(row: LayerCurvature) -> LayerCurvature:
        value, residual = pairs[row.name]
        return replace(row, top_eigenvalue=value, top_eigenvalue_residual=residual)

    return profile.with_rows(fill)


def _cost(extent: Extent) -> Cost:
    return Cost(row_passes=1, row_products=True) if extent.distill else Cost(20.0 * extent.layers)


MEASURE = Measure("top_eigenvalue", step="gradients and top eigenvalues", take=take, cost=_cost)
