"""Gram spectrum: every eigenpair of the distill objective's Hessian from a small matrix of inner products.

At the float weights H = AᵀA exactly, with one row of A for each output row s and class c,
√(p_c / N) ∇_w (z_c − Σ_c' p_c' z_c'), a vector–Jacobian product of the network (theory: CET). The eigenvalues of AAᵀ
are those of H, and everything that is needed of the eigenvectors v_j = Aᵀ u_j / √λ_j follows from per-layer Gram matrices
A_i A_iᵀ and projections A_i Δ_i: the rows themselves are held for a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_caq.batches import batch_size, run_model
from lightning_caq.layers import Layer
from lightning_caq.matrix import columns, from_matrix
from lightning_caq.objective import output_rows

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class OutputRow:
    """One row of A: an output of one sample, and the class it belongs to.

    Attributes:
        batch: Index of the batch.
        sample: Index of the sample in the batch.
        position: Index of the output row in the sample; 0 unless a sample has several, as tokens or pixels.
        cls: Class c.
        weight: p_c / N, the square of the row's factor.
    """

    batch: int
    sample: int
    position: int
    cls: int
    weight: float


@dataclass(frozen=True)
class GramSpectrum:
    """The spectrum of H and how it is spread over the layers.

    Attributes:
        values: λ_1 ≥ λ_2 ≥ …, all non-zero eigenvalues, shape (m,), float64.
        energies: Σ_j λ_j ‖v_j restricted to layer i‖² of the first ``k`` pairs by layer name.
        traces: tr(H_ii) by layer name, exact for the rows kept.
        projected: By layer name, bits to (u_jᵀ A_i Δ_i)_j = √λ_j v_jᵀ Δ_i, shape (m,).
        kept: Share of the output Hessian's trace in the rows that were kept.
        rows: Number of rows kept.
    """

    values: Tensor
    energies: dict[str, float]
    traces: dict[str, float]
    projected: dict[str, dict[int, Tensor]]
    kept: float
    rows: int


def gram_spectrum(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    deltas: Mapping[str, Mapping[int, Tensor]],
    *,
    k: int,
    tolerance: float = 1e-4,
    max_rows: int = 2048,
    memory: int = 2**30,
) -> GramSpectrum:
    """The spectrum of the distill Hessian over the layers' weights.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b), whose components along the eigenvectors are wanted.
        k: How many leading pairs span the short-axis subspace S.
        tolerance: Share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: Most rows to keep; the heaviest are.
        memory: Bytes that rows may take at a time. Layers are worked on in groups that fit, each group in one pass; a
            single layer that does not fit is worked on alone.

    Returns:
        The spectrum.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> gram_spectrum(net, [layer], [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], {"": {}}, k=2).values
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    rows, kept = choose_rows(model, batches, tolerance, max_rows)
    grams: dict[str, Tensor] = {}
    projections: dict[str, dict[int, Tensor]] = {}
    for group in _groups(layers, len(rows), memory):
        for layer, matrix in weight_rows(model, group, batches, rows).items():
            grams[layer] = (matrix @ matrix.T).double()
            projections[layer] = {b: (matrix @ d.flatten().to(matrix)).double() for b, d in deltas[layer].items()}
    total = torch.stack(list(grams.values())).sum(0)
    values, vectors = torch.linalg.eigh(total)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    solid = values > values[:1] * 1e-10
    values, vectors = values[solid], vectors[:, solid]
    lead = vectors[:, :k]
    return GramSpectrum(
        values=values.cpu(),
        energies={name: float((lead * (gram @ lead)).sum()) for name, gram in grams.items()},
        traces={name: float(gram.trace()) for name, gram in grams.items()},
        projected={name: {b: (vectors.T @ p).cpu() for b, p in each.items()} for name, each in projections.items()},
        kept=kept,
        rows=len(rows),
    )


def choose_rows(
    model: nn.Module, batches: Sequence[Any], tolerance: float, max_rows: int
) -> tuple[list[OutputRow], float]:
    """The rows of A worth computing, heaviest first to be kept, in the order of the batches.

    A row's weight is its share of the trace of the output Hessian, p_c ‖e_c − p‖² / N: a class without probability, or
    one that has it all, adds nothing.

    Returns:
        The rows, and the share of the trace that they hold.
    """
    weights, shapes = [], []
    samples = sum(map(batch_size, batches))
    with torch.no_grad():
        for batch in batches:
            z = output_rows(run_model(model, batch)).double()
            # A single column has the output Hessian 1 of half the squared error: one row of weight 1 / N.
            p = z.softmax(1) if z.shape[1] > 1 else torch.ones_like(z)
            distance = 1 - 2 * p + p.square().sum(1, keepdim=True) if z.shape[1] > 1 else torch.ones_like(z)
            # As in the objective, a batch counts by its samples, however many output rows these have.
            weights.append(torch.stack([p, p * distance]).cpu() * (batch_size(batch) / samples / len(z)))
            shapes.append(len(z) // batch_size(batch))
    shares = torch.cat([w[1].flatten() for w in weights])
    order = shares.argsort(descending=True, stable=True)
    held = shares[order].cumsum(0) / shares.sum()
    count = min(int((held < 1 - tolerance).sum()) + 1, max_rows, len(order))
    chosen = torch.zeros(len(shares), dtype=torch.bool)
    chosen[order[:count]] = True
    rows, offset = [], 0
    for b, (w, positions) in enumerate(zip(weights, shapes, strict=True)):
        mask = chosen[offset : offset + w[1].numel()].reshape(w[1].shape)
        offset += w[1].numel()
        for r, c in mask.nonzero().tolist():
            rows.append(OutputRow(b, r // positions, r % positions, c, float(w[0][r, c])))
    return rows, float(held[count - 1])


def weight_rows(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], rows: Sequence[OutputRow]
) -> dict[str, Tensor]:
    """A_i of some layers: the gradient of every row with respect to the layer's weight, shape (rows, n_i)."""
    weights = {id(model.get_submodule(name)): layer for layer in layers for name in layer.modules}
    result = {layer.name: torch.zeros(len(rows), layer.weights) for layer in layers}
    for start, chunk in _chunks(rows):
        batch = _take(batches[chunk[0].batch], [row.sample for row in chunk])
        with _recording(model, weights) as calls, torch.enable_grad():
            output = run_model(model, batch)
        seed = _seed(output.detach(), chunk)
        gradients = torch.autograd.grad(output, [y for _, _, _, y in calls], grad_outputs=seed, allow_unused=True)
        for (layer, module, x, _), gradient in zip(calls, gradients, strict=True):
            if gradient is not None:
                part = _weight_gradients(layer, module, x, gradient)
                result[layer.name][start : start + len(chunk)] += part.reshape(len(chunk), -1).cpu()
    return result


def _groups(layers: Sequence[Layer], rows: int, memory: int) -> Iterator[list[Layer]]:
    group: list[Layer] = []
    for layer in layers:
        if group and 4 * rows * (sum(x.weights for x in group) + layer.weights) > memory:
            yield group
            group = []
        group.append(layer)
    yield group


def _chunks(rows: Sequence[OutputRow]) -> Iterator[tuple[int, Sequence[OutputRow]]]:
    """Runs of rows that share a batch."""
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and stop - start < _ROWS_AT_ONCE and rows[stop].batch == rows[start].batch:
            stop += 1
        yield start, rows[start:stop]
        start = stop


def _take(batch: Any, samples: list[int]) -> Any:
    size = batch_size(batch)
    return tree_map_only(Tensor, lambda t: t[samples] if t.ndim and len(t) == size else t, batch)


def _seed(output: Tensor, chunk: Sequence[OutputRow]) -> Tensor:
    """What to multiply the outputs' gradients by: √(p_c / N) (e_c − p) at each row's own output row."""
    logits = output_rows(output).reshape(len(chunk), -1, output_rows(output).shape[1])
    seed = torch.zeros_like(logits)
    for r, row in enumerate(chunk):
        if logits.shape[2] > 1:
            seed[r, row.position] = -logits[r, row.position].softmax(0)
        seed[r, row.position, row.cls] += 1
        seed[r, row.position] *= row.weight**0.5
    if output.ndim >= 4:
        moved = output.movedim(1, -1)
        return seed.reshape(moved.shape).movedim(-1, 1)
    return seed.reshape(output.shape)


Call = tuple[Layer, nn.Module, Tensor, Tensor]


@contextmanager
def _recording(model: nn.Module, weights: Mapping[int, Layer]) -> Iterator[list[Call]]:
    """Note layer, module, input and output of every call of the layers, outputs as nodes of the graph."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((weights[id(module)], module, args[0].detach(), output))
        return output.clone()  # what follows may work in place

    handles = [m.register_forward_hook(hook) for m in model.modules() if id(m) in weights]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _weight_gradients(layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of every sample with respect to the weight, shape (samples, *weight.shape)."""
    if isinstance(module, nn.Embedding):
        result = gradient.new_zeros(len(inputs), layer.shape[0], layer.shape[1])
        words = inputs.reshape(len(inputs), -1, 1).expand(-1, -1, layer.shape[1])
        return result.scatter_add_(1, words, gradient.reshape(words.shape))
    if isinstance(module, nn.Linear):
        layer = replace(layer, kind="linear")  # it may share the table of an embedding
    patches = columns(layer, module, inputs)  # (samples, groups, columns, positions)
    if layer.kind == "linear":
        outs = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
    else:
        outs = gradient.reshape(len(gradient), layer.groups, -1, patches.shape[-1])
    matrices = outs @ patches.transpose(2, 3)  # (samples, groups, outputs, columns)
    if not layer.transposed:
        return matrices.reshape(len(gradient), *layer.shape)
    return torch.stack([from_matrix(layer, m) for m in matrices])
