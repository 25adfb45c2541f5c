"""Cheap sensitivities of the layers: gradient norms, Fisher and Gauss–Newton diagonals, top eigenvalues, divergences.

They are what the published baselines allocate bits by. The weights of the layers must require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.measures.gram.output_rows import OutputRow, choose_rows
from lightning_caq.measures.gram.weight_rows import passes, weight_rows
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.krylov import Krylov
from lightning_caq.measures.rounding.rounding_errors import loss_change
from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective, make_objective
from lightning_caq.utilities.seeding import generator

_LEAST_ROWS = 64


def gradient_norms(model: nn.Module, layers: Sequence[Layer], objective: Objective) -> dict[str, float]:
    """‖g_i‖, g_i = ∂ℓ/∂W_i, nat/weight: the norm of the mean gradient over all samples, whatever the batches' sizes.

    Exact. Zero for ``distill``, whose minimum the float weights are. Costs one gradient.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ.

    Returns:
        Layer name to norm; zeros for a layer that no batch reaches.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> mean_output = make_objective("task", net, x.split(2), lambda model, batch: model(batch).mean())
        >>> gradient_norms(net, layers, mean_output)[""] ** 2  # of the gradient (6, 8) / 3
        11.1...
    """
    gradient = Hessian(model, layers, objective, graph_memory=0).gradient()
    return {layer.name: float(g.norm(dtype=torch.float64)) for layer, g in zip(layers, gradient, strict=True)}


def fisher_diagonals(model: nn.Module, layers: Sequence[Layer], objective: Objective) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix, E_s[(∂ℓ_s/∂W_i)²] over samples s, nat²/weight².

    With the labels that the loss holds, so it is the Fisher matrix of the model only as far as the model is right
    (Kunstner, Balles and Hennig 2019); its mean over samples is exact. A sample's loss is the loss of a batch of that
    sample alone, so any loss will do. Costs one gradient a sample, in batches of one.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ, ``task``.

    Returns:
        Layer name to diagonal, in the shape of the weight.

    Raises:
        OptionError: For ``distill``, where every sample's gradient is zero.
        CalibrationError: If a sample's loss is not a finite scalar.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> fisher_diagonals(net, layers, make_objective("task", net, [x], lambda model, batch: model(batch).mean()))
        {'': tensor([[0.5000, 2.0000]])}
    """
    if objective.name == "distill":
        raise OptionError("The Fisher diagonal is zero for objective='distill'; use gauss_newton_diagonals.")
    weights = [layer_weight(model, layer) for layer in layers]
    sums = [torch.zeros_like(w, requires_grad=False) for w in weights]
    for b, batch in enumerate(objective.batches):
        for s in range(batch_size(batch)):
            alone = Objective(objective.name, tuple(take_samples([batch], 1, skip=s)), loss=objective.loss)
            try:
                with torch.enable_grad():
                    loss = alone.batch_loss(model, 0)
            except CalibrationError as error:
                raise CalibrationError(f"Sample {s} of calibration batch {b} by itself: {error}") from error
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for sum_, gradient in zip(sums, gradients, strict=True):
                sum_.addcmul_(gradient, gradient, value=1 / objective.samples)
    return {layer.name: sum_ for layer, sum_ in zip(layers, sums, strict=True)}


def gauss_newton_diagonals(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    tolerance: float = 1e-4,
    max_rows: int = 2048,
    memory: int = 2**30,
    seed: int = 0,
) -> tuple[dict[str, Tensor], float]:
    """Diagonal of the Gauss–Newton matrix of ``distill``, which is its Hessian H = AᵀA; nat/weight².

    Σ over the rows of A of their squares (``gram`` says what the rows are), so exact but for rows that were dropped,
    which can only lower it, and unbiased where rows were drawn (``choose_rows``). Costs one gradient a row, as the Gram
    spectrum does.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        tolerance: Share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: Most rows; of more, so many are drawn.
        memory: Bytes that rows may take at a time.
        seed: Seed of the draw of rows.

    Returns:
        Layer name to diagonal, in the shape of the weight; the share of the output Hessian's trace in the rows that it
        was taken from.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> gauss_newton_diagonals(net, [Layer("", "linear", (1, 2), calls=1, modules=("",))], [x])
        ({'': tensor([[0.5000, 2.0000]])}, 1.0)
    """
    choice = choose_rows(model, batches, tolerance, max_rows, seed=seed)
    rows = choice.rows
    # Squares add up row by row: fewer rows at a time let more layers share a pass.
    step = min(max(memory // (4 * sum(layer.weights for layer in layers)), _LEAST_ROWS), len(rows))
    sums = {x.name: to_matrix(x, torch.zeros_like(layer_weight(model, x), requires_grad=False)) for x in layers}
    for pieces in passes(model, layers, batches, step, memory):
        for start in range(0, len(rows), step):
            for piece, held in weight_rows(model, pieces, batches, rows[start : start + step]).items():
                part = sums[piece.layer.name][:, piece.cut]
                part += held.squares().reshape(part.shape).to(part)
    return {layer.name: from_matrix(layer, sums[layer.name]) for layer in layers}, choice.kept


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
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> found = top_eigenvalues(net, layers, make_objective("distill", net, [x]))
        >>> round(found[""][0], 5)
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
        for piece, held in weight_rows(model, pieces, objective.batches, rows).items():
            gram = held.gram().double().cpu()
            grams[piece.layer.name] = grams[piece.layer.name] + gram if piece.layer.name in grams else gram
    return [grams[layer.name] for layer in layers]


def _largest(
    products: Callable[[list[Tensor]], list[Tensor]], starts: list[Tensor], tolerance: float, max_steps: int
) -> list[tuple[float, float]]:
    """Of several operators, multiplied together, the eigenvalue of largest magnitude and its residual."""
    spaces = [Krylov(start, max_steps) for start in starts]
    found = [(0.0, float("inf"))] * len(spaces)
    while True:
        images = products([space.vector for space in spaces])
        done = True
        for i, (space, image) in enumerate(zip(spaces, images, strict=True)):
            value, residual = found[i]
            if space.ended or residual <= tolerance * abs(value):
                continue
            space.extend(image)
            values, vectors = torch.linalg.eigh(space.matrix())
            top = int(values.abs().argmax())
            found[i] = float(values[top]), space.beta * float(vectors[-1, top].abs())
            done = done and (space.ended or found[i][1] <= tolerance * abs(found[i][0]))
        if done:
            return found


def quantized_kl(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], deltas: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[int, float]]:
    """KL(float ‖ one layer quantized) of the network's outputs, mean over samples, nat (ZeroQ, Cai et al. 2020).

    What ``loss_change`` measures under ``distill``, whatever the objective is; for one output column, half the squared
    difference. Exact. Costs one forward pass a layer and bit-width; the weights are put back.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b).

    Returns:
        Layer name to bits to divergence.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> found = quantized_kl(net, layers, [x], {"": {4: torch.tensor([[0.5, 0.0]])}})
        >>> round(found[""][4], 6)  # ½ (0.5² + 0²) / 2
        0.0625
    """
    target = make_objective("distill", model, batches)
    return {
        layer.name: {b: loss_change(model, layer, target, delta, 0.0) for b, delta in deltas[layer.name].items()}
        for layer in layers
    }
