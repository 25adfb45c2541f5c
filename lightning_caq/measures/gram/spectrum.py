"""Gram spectrum: every eigenpair of the distill objective's Hessian from a small matrix of inner products.

At the float weights H = AᵀA exactly, with one row of A for each output row s and class c,
√(p_c / N) ∇_w (z_c − Σ_c' p_c' z_c'), a vector–Jacobian product of the network (theory: CET). The eigenvalues of AAᵀ
are those of H, and everything that is needed of the eigenvectors v_j = Aᵀ u_j / √λ_j follows from per-layer Gram
matrices A_i A_iᵀ and projections A_i Δ_i: the rows themselves are kept for a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.measures.gram.output_rows import OutputRow, choose_rows, sampling_error
from lightning_caq.measures.gram.pieces import Piece, passes
from lightning_caq.measures.gram.row_forms import Rows
from lightning_caq.measures.gram.weight_rows import weight_rows
from lightning_caq.network.layer_matrix import to_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.utilities.sharing import ALONE, Sharing

_ROWS_MEMORY, _ROWS_MEMORY_GPU = 7 * 2**25, 2**31  # bytes


@dataclass(frozen=True)
class GramSpectrum:
    """The spectrum of H and how it is spread over the layers.

    Attributes:
        values: λ_1 ≥ λ_2 ≥ …, all non-zero eigenvalues, shape (m,), float64.
        trace: tr(H).
        energies: Σ_j λ_j ‖v_j restricted to layer i‖² of the first ``k`` pairs by layer name.
        traces: tr(H_ii) by layer name.
        errors: Their standard errors where rows were drawn at random, else zeros; by layer name.
        projected: By layer name, bits to (u_jᵀ A_i Δ_i)_j = √λ_j v_jᵀ Δ_i, shape (m,).
        parts: The same of each owner's outputs alone, shape (m, owners), for layers whose outputs have owners.
        kept: Share of the output Hessian's trace in the rows that these were taken or drawn from.
        rows: Number of rows.
        candidates: Number of rows that they were taken or drawn from.
        chosen: The rows themselves.
        combinations: u_1, …, u_m as columns, shape (rows, m), float64: v_j = Aᵀ u_j / √λ_j.
    """

    values: Tensor
    trace: float
    energies: dict[str, float]
    traces: dict[str, float]
    errors: dict[str, float]
    projected: dict[str, dict[int, Tensor]]
    parts: dict[str, dict[int, Tensor]]
    kept: float
    rows: int
    candidates: int
    chosen: list[OutputRow]
    combinations: Tensor


def gram_spectrum(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    deltas: Mapping[str, Mapping[int, Tensor]],
    *,
    k: int,
    owners: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-5,
    max_rows: int = 2048,
    memory: int | None = None,
    seed: int = 0,
    sharing: Sharing = ALONE,
) -> GramSpectrum:
    """The spectrum of the distill Hessian over the layers' weights.

    Exact up to the dropped rows and to float32. Where there are more than ``max_rows``, rows are drawn
    (``choose_rows``): traces and ΔᵀHΔ, the sum of the squares of all of ``projected``, are then right in the mean over
    draws; single eigenvalues are not, as noise spreads them: the largest come out too high, the small ones are missing.

    Several processes divide the layers among them, and add up the Gram matrices of all.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b), whose components along the eigenvectors are wanted.
        k: How many leading pairs span the short-axis subspace S.
        owners: Layer name to whose the rows of its matrices are, whole numbers from 0, shape (groups, outputs).
        tolerance: Share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: Most rows; of more, so many are drawn.
        memory: Bytes that rows may take at a time, by default ``rows_memory``. As many layers are worked on in one pass
            as fit; a layer that does not fit alone is cut along its output channels.
        seed: Seed of the draw of rows.
        sharing: Who divides the layers.

    Returns:
        The spectrum; figures by layer name for this rank's layers.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> gram_spectrum(net, [layer], [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], {"": {}}, k=2).values
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    mine = sharing.mine(layers)
    choice = sharing.first(choose_rows(model, batches, tolerance, max_rows, seed=seed), "rows of outputs")
    rows = choice.rows
    # In the precision of the rows: with many layers these matrices are what takes the room.
    weight = layer_weight(model, layers[0])
    dtype = weight.dtype
    grams = {layer.name: torch.zeros(len(rows), len(rows), dtype=dtype) for layer in mine}
    owners = owners or {}
    counts = {layer.name: int(owners[layer.name].max()) + 1 if layer.name in owners else 1 for layer in mine}
    projections = {
        layer.name: {b: torch.zeros(len(rows), counts[layer.name], dtype=torch.float64) for b in deltas[layer.name]}
        for layer in mine
    }
    for pieces in passes(model, mine, batches, len(rows), memory or rows_memory(weight)):
        parts = weight_rows(model, pieces, batches, rows)
        while parts:
            piece, piece_rows = parts.popitem()  # let go before the next pass fills memory
            grams[piece.layer.name] += piece_rows.gram().cpu()
            for b, delta in deltas[piece.layer.name].items():
                projections[piece.layer.name][b] += _project(piece_rows, piece, delta, owners).cpu()
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for gram in grams.values():
        total += gram
    sharing.sum(total, "Gram matrix")
    values, vectors = torch.linalg.eigh(total)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # What is left of zero eigenvalues is the rounding noise of the rows.
    solid = values > 10 * torch.finfo(dtype).eps * values[:1]
    values, vectors = values[solid], vectors[:, solid]
    lead = vectors[:, :k]
    return GramSpectrum(
        values=values.cpu(),
        trace=float(total.trace()),
        energies={name: float((lead * (gram.double() @ lead)).sum()) for name, gram in grams.items()},
        traces={name: float(gram.diagonal().double().sum()) for name, gram in grams.items()},
        errors={name: sampling_error(rows, gram.diagonal()) for name, gram in grams.items()},
        projected={
            name: {b: (vectors.T @ p.sum(1)).cpu() for b, p in by_bits.items()} for name, by_bits in projections.items()
        },
        parts={name: {b: (vectors.T @ p).cpu() for b, p in projections[name].items()} for name in owners},
        kept=choice.kept,
        rows=len(rows),
        candidates=choice.candidates,
        chosen=rows,
        combinations=vectors.cpu(),
    )


def rows_memory(weight: Tensor) -> int:
    """Bytes that rows may take at a time, beside a weight: 224 MiB, and 2 GiB on a GPU.

    A pass over the samples costs the same for few layers as for many, and a GPU is soon done with what a layer takes.

    Example:
        >>> rows_memory(torch.zeros(1)) / 2**20
        224.0
    """
    return _ROWS_MEMORY_GPU if weight.is_cuda else _ROWS_MEMORY


def _project(rows: Rows, piece: Piece, delta: Tensor, owners: Mapping[str, Tensor]) -> Tensor:
    """A_i Δ, a column for each owner; shape (rows, 1) where outputs have none, float64."""
    part = to_matrix(piece.layer, delta)[:, piece.cut]
    if piece.layer.name not in owners:
        return rows.project(part)[:, None].double()
    owner = owners[piece.layer.name]
    projected = rows.project_by(part, owner[:, piece.cut]).double()
    missing = int(owner.max()) + 1 - projected.shape[1]  # the last owners may have nothing in this piece
    return F.pad(projected, (0, missing))
