"""Gram spectrum: every eigenpair of the distill objective's Hessian from a small matrix of inner products.

At the float weights H = AᵀA exactly, with one row of A for each output row s and class c,
√(p_c / N) ∇_w (z_c − Σ_c' p_c' z_c'), a vector–Jacobian product of the network (theory: CET). The eigenvalues of AAᵀ
are those of H, and everything that is needed of the eigenvectors v_j = Aᵀ u_j / √λ_j follows from per-layer Gram
matrices A_i A_iᵀ and projections A_i Δ_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.measures.gram.folded_rows import FoldedRows, largest_width
from lightning_caq.measures.gram.layer_calls import Rows
from lightning_caq.measures.gram.output_rows import OutputRow, choose_rows, sampling_error
from lightning_caq.measures.gram.pieces import Piece, passes, whole_pieces
from lightning_caq.measures.gram.row_forms import ExactRows
from lightning_caq.measures.gram.weight_rows import fill_rows
from lightning_caq.network.batches import batch_size
from lightning_caq.network.layer_matrix import to_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.utilities.seeding import generator
from lightning_caq.utilities.sharing import ALONE, Sharing

_ROWS_MEMORY, _ROWS_MEMORY_GPU = 2**29, 2**31  # bytes
_FEW_ROWS = 512


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
        squares: Of each row Σ (A_i Δ_i)² at the fewest bits, over this rank's layers: what it adds to the energies of
            their errors, shape (rows,), float64.
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
    squares: Tensor
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
    max_rows: int | None = None,
    memory: int | None = None,
    exact: bool = False,
    seed: int = 0,
    sharing: Sharing = ALONE,
) -> GramSpectrum:
    """The spectrum of the distill Hessian over the layers' weights.

    Exact up to the dropped rows and to float32 where all rows fit in memory. Where they do not, those of large layers
    are folded (``FoldedRows``), so that one pass serves all layers: traces and ΔᵀHΔ, the sum of the squares of all of
    ``projected``, are still exact, eigenvalues are estimates. Where there are more than ``max_rows``, rows are drawn
    (``choose_rows``): traces and ΔᵀHΔ are then right in the mean over draws; single eigenvalues are not, as noise
    spreads them: the largest come out too high, the small ones are missing. Costs about two gradients of one sample a
    row, however many layers and classes there are.

    Several processes divide the layers among them, and add up the Gram matrices of all.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b), whose components along the eigenvectors are wanted.
        k: How many leading pairs span the short-axis subspace S.
        owners: Layer name to whose the rows of its matrices are, whole numbers from 0, shape (groups, outputs).
        tolerance: Share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: Most rows; of more, so many are drawn. By default four a sample or 512; of more, two a
            sample are drawn.
        memory: Bytes that rows may take, by default ``rows_memory``.
        exact: Whether rows are never folded: as many layers are worked on in one pass as fit, and a layer that does
            not fit alone is cut along its output channels.
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
    most, draws = (max_rows, max_rows) if max_rows else affordable_rows(sum(map(batch_size, batches)), k)
    choice = choose_rows(model, batches, tolerance, most, draws=draws, seed=seed)
    choice = sharing.first(choice, "rows of outputs")
    rows = choice.rows
    # In the precision of the rows: with many layers these matrices are what takes the room.
    weight = layer_weight(model, layers[0])
    dtype = weight.dtype
    memory = memory or rows_memory(weight)
    errors = _Errors(deltas, owners or {})
    grams = {layer.name: torch.zeros(len(rows), len(rows), dtype=dtype) for layer in mine}
    projections = {
        layer.name: {b: torch.zeros(len(rows), errors.count(layer), dtype=torch.float64) for b in deltas[layer.name]}
        for layer in mine
    }
    folded = False
    for piece_rows in _row_passes(model, mine, batches, rows, errors, memory=memory, seed=seed, exact=exact):
        fill_rows(model, piece_rows, batches, rows, memory=memory // 2)
        while piece_rows:
            piece, of_piece = piece_rows.popitem()  # let go before the next pass fills memory
            name = piece.layer.name
            folded |= isinstance(of_piece, FoldedRows)
            grams[name] += of_piece.gram().cpu()
            for b, projected in errors.project(piece, of_piece).items():
                projections[name][b] += projected
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for gram in grams.values():
        total += gram
    sharing.sum(total, "Gram matrix")
    values, vectors = torch.linalg.eigh(total)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not folded:  # then what is left of zero eigenvalues is the rounding noise of the rows
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
        parts={name: {b: (vectors.T @ p).cpu() for b, p in projections[name].items()} for name in errors.owners},
        kept=choice.kept,
        rows=len(rows),
        candidates=choice.candidates,
        chosen=rows,
        squares=sum(
            (by_bits[min(by_bits)].sum(1).square() for by_bits in projections.values() if by_bits),
            torch.zeros(len(rows), dtype=torch.float64),
        ),
        combinations=vectors.cpu(),
    )


def affordable_rows(samples: int, k: int) -> tuple[int, int]:
    """How many rows are all taken, and how many are drawn of more.

    All where there are at most four a sample, or few altogether; else two a sample, enough for ``k`` eigenpairs.

    Example:
        >>> affordable_rows(256, 64), affordable_rows(16, 64)
        ((1024, 512), (512, 64))
    """
    return max(4 * samples, k, _FEW_ROWS), max(2 * samples, k, 2)


def _row_passes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    rows: Sequence[OutputRow],
    errors: _Errors,
    *,
    memory: int,
    seed: int,
    exact: bool,
) -> Iterator[dict[Piece, Rows]]:
    """Empty rows of all layers, pass by pass: a single one, unless rows have to be exact and do not fit."""
    if not layers:  # of several processes one may have none
        return
    like = layer_weight(model, layers[0])
    pieces = whole_pieces(model, layers, batches)
    numbers = memory // (2 * like.element_size() * len(rows))  # of each row; the other half is for computing them
    if exact or sum(piece.numbers(1) for piece in pieces) <= numbers:
        for group in passes(model, layers, batches, len(rows), memory):
            yield {piece: piece.empty(len(rows), like) for piece in group}
        return
    numbers //= 2  # more would make inner products dearer than the rows themselves
    numbers -= sum(piece.numbers(1) for piece in pieces if piece.looked_up)  # words have no columns to fold
    sizes = {piece: min(piece.numbers(1), piece.layer.weights) for piece in pieces if not piece.looked_up}
    width = largest_width(list(sizes.values()), max(numbers, len(sizes)))
    yield {
        piece: errors.folded(piece, len(rows), width, generator(seed, f"fold/{piece.layer.name}"), like)
        if sizes.get(piece, 0) > width
        else piece.empty(len(rows), like)
        for piece in pieces
    }


def rows_memory(weight: Tensor) -> int:
    """Bytes that rows may take, beside a weight: 512 MiB, and 2 GiB on a GPU.

    Example:
        >>> rows_memory(torch.zeros(1)) / 2**20
        512.0
    """
    return _ROWS_MEMORY_GPU if weight.is_cuda else _ROWS_MEMORY


@dataclass(frozen=True)
class _Errors:
    """Errors that rows are multiplied with.

    Attributes:
        deltas: Layer name to bits to Δ_i(b).
        owners: Layer name to whose the rows of its matrices are.
    """

    deltas: Mapping[str, Mapping[int, Tensor]]
    owners: Mapping[str, Tensor]

    def count(self, layer: Layer) -> int:
        """Number of owners of a layer's outputs; 1 where they have none."""
        return int(self.owners[layer.name].max()) + 1 if layer.name in self.owners else 1

    def project(self, piece: Piece, rows: Rows) -> dict[int, Tensor]:
        """Bits to A_i Δ, a column for each owner; shape (rows, 1) where outputs have none, float64."""
        if isinstance(rows, FoldedRows):
            return {b: projected.cpu() for b, projected in rows.projected.items()}
        return {b: self._project(piece, rows, delta).cpu() for b, delta in self.deltas[piece.layer.name].items()}

    def folded(self, piece: Piece, rows: int, width: int, draws: torch.Generator, like: Tensor) -> FoldedRows:
        """Empty rows that are multiplied with the errors as they come."""
        layer, deltas = piece.layer, self.deltas[piece.layer.name]
        signs = torch.randint(0, 2, (layer.weights,), generator=draws, dtype=torch.int8) * 2 - 1
        owner = self.owners.get(layer.name)
        return FoldedRows(rows, width, signs, list(deltas), lambda b: to_matrix(layer, deltas[b]), owner, like)

    def _project(self, piece: Piece, rows: ExactRows, delta: Tensor) -> Tensor:
        part = to_matrix(piece.layer, delta)[:, piece.cut]
        owner = self.owners.get(piece.layer.name)
        if owner is None:
            return rows.project(part)[:, None].double()
        projected = rows.project_by(part, owner[:, piece.cut]).double()
        missing = self.count(piece.layer) - projected.shape[1]  # the last owners may have nothing in this piece
        return F.pad(projected, (0, missing))
