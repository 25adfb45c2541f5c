"""Lanczos on operators whose spectra are known."""

import pytest
import torch
from every import every

from lightning_caq.measures.hessian.lanczos import lanczos


def _operator(values, dtype=torch.float64, seed=0):
    """A symmetric matrix with these eigenvalues in a random basis."""
    draws = torch.Generator().manual_seed(seed)
    n = len(values)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=draws, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T
    return matrix.to(dtype), torch.randn(n, generator=draws, dtype=torch.float64).to(dtype)


def _check(matrix, pairs, tolerance):
    """Orthonormal vectors, residuals that tell the truth, magnitudes in order."""
    vectors = pairs.vectors
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=vectors.dtype), rtol=0, atol=tolerance
    )
    true = (matrix @ vectors - vectors * pairs.values.to(vectors)).norm(dim=0).double()
    assert bool((true <= pairs.residuals + tolerance * pairs.values.abs().max()).all())
    assert bool((pairs.values.abs().diff() <= 1e-12).all())


def test_mixed_signs_come_by_magnitude():
    values = [9.0, -7.0, 5.0, -4.0, 3.0, *torch.linspace(-1, 1, 60).tolist()]
    matrix, start = _operator(values)
    pairs = lanczos(lambda v: matrix @ v, start, 5, tolerance=1e-8)
    assert pairs.values.tolist() == pytest.approx([9, -7, 5, -4, 3], abs=1e-8)
    assert pairs.products < 65
    _check(matrix, pairs, 1e-9)


@every("seed", range(5))
def test_no_ghosts(seed):
    """Without reorthogonalisation a dominant eigenvalue comes back as copies of itself long before 80 steps."""
    values = [1000.0, -100.0, 10.0, *torch.linspace(0.01, 1, 197).tolist()]
    matrix, start = _operator(values, torch.float32, seed)
    pairs = lanczos(lambda v: matrix @ v, start, 40, tolerance=1e-9, max_steps=80)
    assert pairs.products == 80
    assert pairs.values[:3].tolist() == pytest.approx([1000, -100, 10], rel=1e-4)
    assert pairs.values[3] < 1.01
    _check(matrix, pairs, 1e-4)


def test_repeated_eigenvalues_are_all_found():
    """One start vector reaches one vector of each eigenspace; the fresh starts reach the others."""
    values = [5.0, 5.0, 5.0, -2.0, -2.0, 1.0, *[0.0] * 30]
    matrix, start = _operator(values)
    pairs = lanczos(lambda v: matrix @ v, start, 6)
    assert pairs.values.tolist() == pytest.approx(values[:6], abs=1e-9)
    assert bool(pairs.converged.all())
    _check(matrix, pairs, 1e-9)


def test_a_basis_in_a_file_gives_the_same():
    matrix, start = _operator(torch.linspace(-1, 2, 150).tolist(), torch.float32)
    here, there = (lanczos(lambda v: matrix @ v, start, 5, memory=m) for m in (2**30, 0))
    assert torch.equal(here.values, there.values)
    assert torch.equal(here.vectors, there.vectors)


@every("k", [0, 5])
def test_more_pairs_than_there_are(k):
    with pytest.raises(ValueError, match="choose 1 to 4"):
        lanczos(torch.zeros_like, torch.ones(4), k)


def test_all_pairs_of_a_small_operator():
    matrix, start = _operator([3.0, 2.0, -1.0, 0.5])
    pairs = lanczos(lambda v: matrix @ v, start, 4)
    assert pairs.values.tolist() == pytest.approx([3, 2, -1, 0.5], abs=1e-10)
    torch.testing.assert_close((pairs.vectors * pairs.values) @ pairs.vectors.T, matrix)


def test_zero_operator():
    pairs = lanczos(torch.zeros_like, torch.randn(7), 3)
    assert pairs.values.tolist() == [0.0, 0.0, 0.0]
    assert pairs.products == 7


def test_residuals_admit_an_early_stop():
    matrix, start = _operator(torch.linspace(0.9, 1, 100).tolist())
    pairs = lanczos(lambda v: matrix @ v, start, 3, tolerance=1e-12, max_steps=6)
    assert pairs.products == 6
    assert pairs.residuals.max() > 1e-4
    assert not bool(pairs.converged.all())
    true = torch.linalg.eigvalsh(matrix)
    nearest = (pairs.values[:, None] - true).abs().min(dim=1).values
    assert bool((nearest <= pairs.residuals + 1e-12).all())
