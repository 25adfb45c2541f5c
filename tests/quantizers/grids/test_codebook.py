"""Quantizers with tables against dynamic programming, brute force, numpy and their papers' formulas."""

import itertools

import numpy as np
import pytest
import torch
from every import every

from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.grids.basis import fit_basis, refine_basis, squared_errors
from lightning_caq.quantizers.grids.codebook import Codebook, nearest_codes
from lightning_caq.quantizers.grids.levels import levels
from lightning_caq.quantizers.grids.values import fit_codebook
from lightning_caq.sizes import CODEBOOKS, PER_LAYER, stored_numbers


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(values, w):
    return float((values.nearest(w).double() - w.double()).square().sum())


def _best_kmeans(points, k):
    """Least squared error of k centres on a line, by dynamic programming over sorted points."""
    x = np.sort(np.asarray(points, float))
    n, total, squares = len(x), np.r_[0, x.cumsum()], np.r_[0, (x * x).cumsum()]

    def spread(i, j):
        return squares[j] - squares[i] - (total[j] - total[i]) ** 2 / (j - i)

    cost = [0.0] + [np.inf] * n
    for _ in range(k):
        cost = [np.inf] + [min(cost[i] + spread(i, j) for i in range(j)) for j in range(1, n + 1)]
    return cost[n]


@every("quantizer", CODEBOOKS)
@every("bits", [1, 2, 3, 5, 8])
def test_codes_are_the_nearest_values(quantizer, bits):
    w = _draw(3, 4, 5, 2)
    shape = (1, 4, 1, 1)
    book = fit_codebook(w, bits, shape, quantizer)
    rows = 1 if quantizer in PER_LAYER else 4
    assert book.basis.shape == (1, rows, 1, 1, len(levels(quantizer, bits)))
    assert book.storage == 32 * stored_numbers(quantizer, bits, 4)
    table = book.table.expand(1, 4, 1, 1, 2**bits)
    distances = (w[..., None] - table).abs()
    torch.testing.assert_close((book.nearest(w) - w).abs(), distances.amin(-1))
    codes = book.codes(w)
    assert codes.shape == w.shape
    assert codes.dtype == torch.float32
    assert torch.equal(book.nearest(book.values(codes)), book.values(codes))
    again = Codebook.of(quantizer, bits, book.basis)
    assert torch.equal(again.table, book.table)


def test_nearest_code_of_neighbouring_floats_is_exact():
    low = torch.tensor(1.0)
    table = torch.stack([low, torch.nextafter(low, torch.tensor(2.0))])[None]
    assert nearest_codes(table, table).tolist() == [[0, 1]]


@every("bits", [1, 2, 3])
def test_kmeans_reaches_the_optimum_of_separated_clusters(bits):
    centres = torch.arange(2**bits).float() * 3
    w = (centres[:, None] + 0.2 * _draw(2**bits, 5)).reshape(1, -1)
    assert _error(fit_codebook(w, bits, (1, 1), "codebook"), w) == pytest.approx(_best_kmeans(w[0], 2**bits), rel=1e-5)


def test_kmeans_is_never_below_the_optimum_and_near_it():
    for seed in range(5):
        w = _draw(1, 60, seed=seed)
        found, best = _error(fit_codebook(w, 2, (1, 1), "codebook"), w), _best_kmeans(w[0], 4)
        assert best * (1 - 1e-5) <= found <= 1.2 * best


def test_regression_is_that_of_numpy():
    signs = levels("lq_nets", 3)
    w, codes = _draw(2, 40).double(), torch.randint(0, 8, (2, 40), generator=torch.Generator().manual_seed(1))
    found = fit_basis(w, codes, signs)
    for row, c, v in zip(w.numpy(), codes, found, strict=True):
        expected = np.linalg.lstsq(signs[:, c].T.numpy(), row, rcond=None)[0]
        np.testing.assert_allclose(v, expected, rtol=1e-6, atol=1e-9)


def test_turns_never_raise_the_error():
    w, signs = _draw(5, 200).double(), levels("lq_nets", 3)
    basis = _draw(5, 3, seed=4).double().abs()
    before = squared_errors(w, basis @ signs)
    for _ in range(10):
        basis = refine_basis(w, basis, signs, rounds=1)
        after = squared_errors(w, basis @ signs)
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


@every("bits", [2, 3, 4])
def test_lq_nets_is_no_worse_than_even_spacing(bits):
    w = _draw(4, 20_000)
    found = _error(fit_codebook(w, bits, (4, 1), "lq_nets"), w)
    assert found <= _error(fit_grid(w, bits, (4, 1), symmetry="mid_rise"), w)
    assert found <= _error(fit_grid(w, bits, (4, 1)), w)


def test_lq_nets_reaches_the_optimum_of_a_grid_search():
    w = _draw(1, 80, seed=7)
    x = w.double().numpy()[0]
    steps = np.linspace(0, 2, 81)
    best = min(
        np.min([(x - p) ** 2 for p in (-a - b, a - b, b - a, a + b)], axis=0).sum()
        for a, b in itertools.combinations(steps, 2)
    )
    assert _error(fit_codebook(w, 2, (1, 1), "lq_nets"), w) <= 1.02 * best


def test_abc_net_follows_the_paper():
    w = _draw(3, 50) + 0.3
    book = fit_codebook(w, 3, (3, 1), "abc_net")
    for row, alpha in zip(w.double().numpy(), book.basis, strict=True):
        centred = row - row.mean()
        bases = np.stack([np.where(centred + u * row.std() >= 0, 1, -1) for u in (-1, 0, 1)], 1)
        expected = np.linalg.lstsq(bases, row, rcond=None)[0]
        np.testing.assert_allclose(alpha[0], expected, rtol=1e-4)
        kept = np.square(bases @ expected - row).sum()
        sums = [
            sum(s * e for s, e in zip(signs, expected, strict=True)) for signs in itertools.product((-1, 1), repeat=3)
        ]
        assert np.min([(row - s) ** 2 for s in sums], axis=0).sum() <= kept + 1e-12


@every("bits", range(1, 9))
def test_series_stays_within_its_bound(bits):
    w = _draw(8, 300)
    book = fit_codebook(w, bits, (8, 1), "series")
    largest = w.abs().amax(1, keepdim=True)
    assert bool(((book.nearest(w) - w).abs() <= largest * (2.0**-bits + 1e-6)).all())
    assert book.basis.shape[-1] == (bits + 1) // 2  # one scale a term


def test_series_terms_add_up():
    w = _draw(2, 50).double()
    s1, s2 = fit_codebook(w, 4, (2, 1), "series").basis.double().reshape(2, 2, 1).unbind(1)
    table = fit_codebook(w, 4, (2, 1), "series").table
    steps = torch.tensor([-1.5, -0.5, 0.5, 1.5]).double()
    sums = (s1[..., None] * steps[:, None] + s2[..., None] * steps).reshape(2, 16).sort(1).values
    torch.testing.assert_close(table[:, 0].double(), sums, rtol=1e-5, atol=1e-6)


def test_dorefa_has_the_papers_values_up_to_a_scale():
    w = 0.5 * _draw(4, 100)
    x, top = w.double().numpy(), 7
    squeezed = np.tanh(x)
    values = 2 / top * np.round(top * (squeezed / (2 * np.abs(squeezed).max()) + 0.5)) - 1
    scale = (values * x).sum() / (values * values).sum()
    book = fit_codebook(w, 3, (4, 1), "dorefa")
    assert book.table.shape == (1, 1, 8)
    np.testing.assert_allclose(book.table[0, 0], scale * np.linspace(-1, 1, 8), rtol=1e-5)
    assert _error(book, w) <= np.square(scale * values - x).sum() + 1e-9


@every("quantizer", CODEBOOKS)
@every("value", [0.0, -0.7])
def test_constant_weights(quantizer, value):
    w = torch.full((2, 6), value)
    for bits in (1, 2, 4):
        book = fit_codebook(w, bits, (2, 1), quantizer)
        assert bool(torch.isfinite(book.table).all())
        bound = abs(value) / 2**bits if quantizer == "series" else 0.0
        torch.testing.assert_close(book.nearest(w), w, rtol=1e-5, atol=bound * 1.01 + 1e-7)


@every("quantizer", CODEBOOKS)
def test_error_falls_with_the_bits(quantizer):
    w = 0.3 * _draw(8, 300)
    errors = [_error(fit_codebook(w, bits, (8, 1), quantizer), w) for bits in (1, 2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
