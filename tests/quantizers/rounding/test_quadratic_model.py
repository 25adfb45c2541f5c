import numpy as np
import pytest
import torch

from lightning_caq.quantizers.rounding import quadratic_model
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel


def test_change_and_energy_are_those_of_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(quadratic_model, "_CHUNK", 7)
    v = torch.linalg.qr(torch.randn(20, 3))[0]
    values, gradient, delta = torch.tensor([3.0, -2.0, 1.0]), torch.randn(20), torch.randn(20, dtype=torch.float64)
    model = QuadraticModel((12, 8), values, v, 0.25, gradient)
    p = v.numpy().astype(float).T @ delta.numpy()
    bend = 3 * p[0] ** 2 - 2 * p[1] ** 2 + p[2] ** 2 + 0.25 * float(delta @ delta)
    assert model.change(delta) == pytest.approx(gradient.numpy().astype(float) @ delta.numpy() + bend / 2)
    assert model.steep_energy(delta) == pytest.approx(np.array([3, 2, 1]) @ p**2)
    assert model.convex().change(delta) == pytest.approx((bend + 4 * p[1] ** 2) / 2)


def test_a_change_never_costs_nothing():
    model = QuadraticModel((4,), torch.tensor([2.0]), torch.tensor([[1.0], [0.0], [0.0], [0.0]]), 0.0, torch.zeros(4))
    assert model.stiffness == pytest.approx(0.0005)
    assert model.stiffened(10).residual == pytest.approx(0.005)
    assert model.stiffened(10).stiffened(10).residual == pytest.approx(0.05)
