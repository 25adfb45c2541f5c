"""Folded rows against the rows themselves: exact norms and products with errors, inner products right in the mean."""

import torch

from lightning_caq.measures.gram.folded_rows import FoldedRows, largest_width

ROWS, SHAPE, WIDTH = 3, (2, 4, 5), 8  # groups, outputs, columns


def _factors(positions):
    draws = torch.Generator().manual_seed(0)
    groups, outputs, columns = SHAPE
    g = torch.randn(ROWS, groups, positions, outputs, generator=draws, dtype=torch.float64)
    x = torch.randn(ROWS, groups, positions, columns, generator=draws, dtype=torch.float64)
    return g, x, torch.einsum("rgto,rgtc->rgoc", g, x).flatten(1)


def _folded(seed, owner=None):
    draws = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (40,), generator=draws, dtype=torch.int8) * 2 - 1
    deltas = {b: torch.ones(SHAPE, dtype=torch.float64) * b for b in (2, 3)}
    rows = FoldedRows(ROWS, WIDTH, signs, [2, 3], deltas.__getitem__, owner, torch.zeros(1, dtype=torch.float64))
    g, x, dense = _factors(positions=6)
    for start in range(ROWS):
        rows.put(slice(start, start + 1), g[start : start + 1], x[start : start + 1])
    return rows, dense


def test_norms_and_products_with_errors_are_exact():
    rows, dense = _folded(0)
    torch.testing.assert_close(rows.gram().diagonal(), dense.square().sum(1))
    for b in (2, 3):
        torch.testing.assert_close(rows.projected[b][:, 0], b * dense.sum(1))
    assert rows.folded.shape == (ROWS, WIDTH)


def test_owners_share_a_product_out():
    owner = torch.arange(8).reshape(2, 4) % 3
    rows, dense = _folded(0, owner)
    by_output = dense.unflatten(1, (8, 5)).sum(2)
    expected = torch.stack([by_output[:, owner.flatten() == o].sum(1) for o in range(3)], dim=1)
    torch.testing.assert_close(rows.projected[2], 2 * expected)


def test_inner_products_are_right_in_the_mean():
    grams = torch.stack([_folded(seed)[0].gram() for seed in range(400)])
    dense = _folded(0)[1]
    error = grams.std(0) / 20
    away = ~torch.eye(ROWS, dtype=torch.bool)
    assert bool(((grams.mean(0) - dense @ dense.T).abs() <= 4 * error)[away].all())
    # The variance that the count sketch promises.
    norms = dense.square().sum(1)
    most = (norms[:, None] * norms + (dense @ dense.T).square()) / WIDTH
    assert bool((grams.var(0) <= 1.3 * most)[away].all())


def test_width_fills_the_room():
    for sizes, room in (([10, 20, 1000, 4000], 500), ([5, 5], 100), ([100, 100], 20)):
        width = largest_width(sizes, room)
        assert sum(min(n, width) for n in sizes) <= room
        assert sum(min(n, width + 1) for n in sizes) > room or width >= max(sizes)
