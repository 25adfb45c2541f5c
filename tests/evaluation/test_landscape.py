from __future__ import annotations

import nets
import numpy as np
import pytest
import torch

from lightning_caq.evaluation.landscape import landscape, plane
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.contexts import curvature_safe


def scene(name: str = "mlp"):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    errors = {layer.name: nearest_errors(case.net, layer, [2])[2] for layer in layers}
    return case, layers, errors, make_objective("distill", case.net, case.batches)


def test_the_plane_holds_the_steepest_eigenvector_and_the_error() -> None:
    case, layers, errors, target = scene()
    with curvature_safe(case.net), differentiable(case.net, layers):
        u, v = (torch.cat([x.flatten() for x in axis]) for axis in plane(case.net, layers, target, errors))
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    values, vectors = torch.linalg.eigh(dense.hessian(nets.distill_loss(case)))
    top = vectors[:, values.abs().argmax()]
    delta = torch.cat([errors[layer.name].flatten() for layer in layers])
    assert abs(float(u @ top)) == pytest.approx(1, abs=1e-4)
    assert float(u @ v) == pytest.approx(0, abs=1e-6)
    assert float(v.norm()) == pytest.approx(1)
    assert float(u @ delta) > 0
    torch.testing.assert_close((u @ delta) * u + (v @ delta) * v, delta)


def test_the_grid_is_the_loss_at_its_points_and_weights_are_put_back() -> None:
    case, layers, errors, target = scene("cnn")
    before = {key: x.clone() for key, x in case.net.state_dict().items()}
    with curvature_safe(case.net), differentiable(case.net, layers):
        short, long = plane(case.net, layers, target, errors)
        found = landscape(case.net, layers, target, short, long, errors, size=4)
    assert all(torch.equal(x, before[key]) for key, x in case.net.state_dict().items())
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    u, v = (torch.cat([x.flatten() for x in axis]) for axis in (short, long))
    loss = nets.distill_loss(case)
    with torch.no_grad():
        expected = [[float(loss(dense.call(dense.vector + s * u + t * v))) for s in found.short] for t in found.long]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    hessian = dense.hessian(loss)
    assert found.curvatures == pytest.approx((float(u @ hessian @ u), float(v @ hessian @ v)), rel=1e-4)


def test_the_path_ends_at_the_rounded_weights_and_stays_on_the_grid() -> None:
    case, layers, errors, target = scene()
    with curvature_safe(case.net), differentiable(case.net, layers):
        short, long = plane(case.net, layers, target, errors)
        found = landscape(case.net, layers, target, short, long, errors, size=3)
        wrong = landscape(case.net, layers, target, *_axes(layers, errors), errors, size=3)
    assert len(found.path) == len(layers) + 1
    assert found.path[0] == (0.0, 0.0)
    whole = sum(float(x.square().sum()) for x in errors.values()) ** 0.5
    assert np.hypot(*found.path[-1]) == pytest.approx(whole)
    assert found.off_plane == pytest.approx(0, abs=1e-6)
    assert all(abs(s) <= found.short[-1] and abs(t) <= found.long[-1] for s, t in found.path)
    inside = np.hypot(*wrong.path[-1])
    assert wrong.off_plane == pytest.approx((1 - inside**2 / whole**2) ** 0.5)


def _axes(layers, errors):
    """Two unit directions that have nothing to do with the error: single weights of the first layer."""
    axes = []
    for place in (0, 1):
        axis = [torch.zeros_like(errors[layer.name]) for layer in layers]
        axis[0].view(-1)[place] = 1.0
        axes.append(axis)
    return axes


def test_directions_are_checked_and_an_error_without_a_plane_is_told() -> None:
    case, layers, errors, target = scene()
    u, v = _axes(layers, errors)
    for bad in ((u, u), ([2 * x for x in u], v)):
        with pytest.raises(ValueError, match="orthogonal and of length 1"):
            landscape(case.net, layers, target, *bad, errors)
    with pytest.raises(ValueError, match="size=1"):
        landscape(case.net, layers, target, u, v, errors, size=1)
    zero = {name: torch.zeros_like(x) for name, x in errors.items()}
    with curvature_safe(case.net), differentiable(case.net, layers), pytest.raises(ValueError, match="no plane"):
        plane(case.net, layers, target, zero)
