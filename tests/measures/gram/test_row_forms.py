"""Rows held by their factors: brute force, and whole networks against dense Gauss–Newton matrices."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.gram import row_forms
from lightning_caq.measures.gram.diagonals import gauss_newton_diagonals
from lightning_caq.measures.gram.pieces import passes
from lightning_caq.measures.gram.row_forms import DenseRows, FactoredRows, WordRows
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import find_layers

ROWS, GROUPS, OUTPUTS, COLUMNS = 7, 2, 3, 5


def _check(held, rows, delta):
    """Against the rows themselves, shape (rows, …) like ``delta``."""
    flat = rows.flatten(1)
    torch.testing.assert_close(held.gram(), flat @ flat.T)
    torch.testing.assert_close(held.project(delta), flat @ delta.flatten())
    torch.testing.assert_close(held.squares().flatten(), flat.square().sum(0))
    mix = torch.randn(len(flat), 3, dtype=flat.dtype)
    torch.testing.assert_close(held.combine(mix), flat.T @ mix)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("numbers", [1, 100, 2**22])
def test_factors_are_as_good_as_rows(positions, numbers, monkeypatch):
    monkeypatch.setattr(row_forms, "_BLOCK_NUMBERS", numbers)
    g = torch.randn(ROWS, GROUPS, positions, OUTPUTS, dtype=torch.float64)
    x = torch.randn(ROWS, GROUPS, positions, COLUMNS, dtype=torch.float64)
    delta = torch.randn(GROUPS, OUTPUTS, COLUMNS, dtype=torch.float64)
    rows = torch.einsum("rgto,rgtc->rgoc", g, x)
    dense = DenseRows(ROWS, GROUPS, OUTPUTS, COLUMNS, torch.float64)
    # Room for one position less than there are, as where the first sample is shorter than a later one.
    factored = FactoredRows(ROWS, GROUPS, OUTPUTS, COLUMNS, max(positions - 1, 1), torch.float64)
    for held in (dense, factored):
        for place in (slice(0, 3), slice(3, ROWS)):
            held.put(place, g[place], x[place])
        _check(held, rows, delta)


@every("words", [range(9), range(4, 9)])
def test_words_are_as_good_as_rows(words):
    """Words that come twice in a sample, in two calls, and words that belong to another piece."""
    index = torch.randint(0, 9, (ROWS, 6))
    g = torch.randn(ROWS, 6, COLUMNS, dtype=torch.float64)
    held = WordRows(ROWS, words, COLUMNS, torch.float64)
    held.put(slice(0, 4), g[:4], index[:4])
    held.put(slice(4, ROWS), g[4:], index[4:])
    held.put(slice(0, 4), g[:4], index[:4].flip(1))
    rows = torch.zeros(ROWS, 9, COLUMNS, dtype=torch.float64)
    for r in range(ROWS):
        for t in range(6):
            rows[r, index[r, t]] += g[r, t]
            if r < 4:
                rows[r, index[r].flip(0)[t]] += g[r, t]
    _check(held, rows[:, words.start :], torch.randn(1, len(words), COLUMNS, dtype=torch.float64))


def _few_pixels() -> nn.Module:
    """Convolutions with few positions: groups, a transposed one, and one of two calls."""
    shared = nn.Conv2d(12, 12, 3, padding=1, groups=2)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, groups=2), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(),
        nn.ConvTranspose2d(12, 8, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


class _Tokens(nn.Module):
    """Words, mixed and summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.out = nn.Embedding(9, 20), nn.Linear(20, 24), nn.Linear(24, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(torch.tanh(self.table(words)))).sum(1))


CASES = {
    "pixels": (_few_pixels, [torch.randn(3, 8, 3, 4).double(), torch.randn(2, 8, 3, 4).double()]),
    "tokens": (_Tokens, [torch.randint(0, 9, (4, 2)), torch.randint(0, 9, (3, 3))]),
}


@every("name", CASES)
@every("memory", [2**30, 1500])
def test_networks_with_few_positions_against_the_dense_matrix(name, memory):
    make, batches = CASES[name]
    net = make().double().eval()
    layers = find_layers(net, batches[0])
    pieces = [piece for group in passes(net, layers, batches, 15, memory) for piece in group]
    assert any(piece.factored and piece.positions > 1 for piece in pieces)
    assert any(piece.looked_up for piece in pieces) == (name == "tokens")
    assert (len(pieces) > len(layers)) == (memory < 2**30)
    dense = nets.Dense(net, [layer.name for layer in layers])
    matrix = nets.gauss_newton(nets.Case(net, batches), dense)
    deltas = {x.name: {3: torch.randn(x.shape, dtype=torch.float64)} for x in layers}
    with differentiable(net, layers):
        spectrum = gram_spectrum(net, layers, batches, deltas, k=4, tolerance=0.0, memory=memory, exact=True)
        diagonals, _ = gauss_newton_diagonals(net, layers, batches, tolerance=0.0, memory=memory)
    torch.testing.assert_close(spectrum.values[:8], torch.linalg.eigvalsh(matrix).flip(0)[:8], rtol=1e-7, atol=1e-12)
    for layer, block in zip(layers, dense.blocks(matrix), strict=True):
        assert spectrum.traces[layer.name] == pytest.approx(float(block.trace()), rel=1e-8)
        torch.testing.assert_close(diagonals[layer.name].flatten(), block.diag())
        delta = deltas[layer.name][3].flatten()
        form = float(spectrum.projected[layer.name][3].square().sum())
        assert form == pytest.approx(float(delta @ block @ delta), rel=1e-7)


def test_the_form_with_less_work_is_taken():
    """Token by token a linear layer is factored while T² (outputs + columns + 1) is below outputs · columns."""
    net = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    for tokens, factored in ((1, True), (4, True), (5, False), (64, False)):
        x = torch.randn(2, tokens, 40)
        (pieces,) = passes(net, find_layers(net, x), [x], 10, 2**30)
        assert [piece.factored for piece in pieces] == [factored] * 2
        held = 10 * 2 * (tokens * 90 if factored else 2000)
        assert sum(piece.numbers(10) for piece in pieces) == held
