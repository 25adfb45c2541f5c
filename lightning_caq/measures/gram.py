"""Gram spectrum: every eigenpair of the distill objective's Hessian from a small matrix of inner products.

At the float weights H = AᵀA exactly, with one row of A for each output row s and class c,
√(p_c / N) ∇_w (z_c − Σ_c' p_c' z_c'), a vector–Jacobian product of the network (theory: CET). The eigenvalues of AAᵀ
are those of H, and everything that is needed of the eigenvectors v_j = Aᵀ u_j / √λ_j follows from per-layer Gram
matrices A_i A_iᵀ and projections A_i Δ_i: the rows themselves are held for a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.layers import Layer, layer_weight
from lightning_caq.matrix import to_matrix
from lightning_caq.measures.output_rows import choose_rows
from lightning_caq.measures.weight_rows import passes, weight_rows


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
    tolerance: float = 3e-6,
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
        memory: Bytes that rows may take at a time. As many layers are worked on in one pass as fit; a layer that does
            not fit alone is cut along its output channels.

    Returns:
        The spectrum.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> gram_spectrum(net, [layer], [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], {"": {}}, k=2).values
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    rows, kept = choose_rows(model, batches, tolerance, max_rows)
    grams = {layer.name: torch.zeros(len(rows), len(rows), dtype=torch.float64) for layer in layers}
    projections = {
        layer.name: {b: torch.zeros(len(rows), dtype=torch.float64) for b in deltas[layer.name]} for layer in layers
    }
    for pieces in passes(layers, len(rows), memory):
        for piece, held in weight_rows(model, pieces, batches, rows).items():
            grams[piece.layer.name] += held.gram().double()
            for b, delta in deltas[piece.layer.name].items():
                part = to_matrix(piece.layer, delta)[:, piece.outputs]
                projections[piece.layer.name][b] += held.project(part).double()
    total = torch.stack(list(grams.values())).sum(0)
    values, vectors = torch.linalg.eigh(total)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # What is left of zero eigenvalues is the rounding noise of the rows.
    solid = values > 10 * torch.finfo(layer_weight(model, layers[0]).dtype).eps * values[:1]
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
