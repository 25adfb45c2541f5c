"""The least-squares search of affine grids against numpy."""

import numpy as np
import torch
from every import every

from lightning_caq.quantizers.grids.least_squares import least_squares_grid, narrower_grids
from lightning_caq.quantizers.grids.ranges import spanning_grid


def _rows(seed=0):
    return torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)).double()


def _error(rows, scale, zero, importance=1.0):
    w, s, z = rows.numpy(), scale.numpy(), zero.numpy()
    return (importance * (s * (np.clip(np.rint(w / s + z), 0, 3) - z) - w) ** 2).sum(1)


def _full(rows, zero_point=None):
    top = torch.tensor([[3.0]]).double()
    return top, spanning_grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), top, zero_point)


@every("zero_point", [None, torch.tensor([[1.5]]).double()])
def test_is_no_worse_than_any_start_and_cannot_be_refined(zero_point):
    rows = _rows()
    importance = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)).double() ** 4
    top, full = _full(rows, zero_point)
    starts = [full, *narrower_grids(rows, top, full, zero_point is not None)]
    for weights, factor in ((None, 1.0), (importance, importance.numpy())):
        scale, zero = least_squares_grid(rows, top, starts, zero_point is not None, weights)
        least = _error(rows, scale, zero, factor)
        for start in starts:
            assert (least <= _error(rows, start[0].float().double(), start[1], factor) * (1 + 1e-12)).all()
        if zero_point is not None:
            assert bool((zero == zero_point).all())
        # With its codes kept, no other scale is better: it is that of the regression.
        w, z = rows.numpy(), zero.numpy()
        u = np.clip(np.rint(w / scale.numpy() + z), 0, 3) - z
        best = (factor * u * w).sum(1) / (factor * u * u).sum(1)
        np.testing.assert_allclose(scale.numpy()[:, 0], best, rtol=2e-3)


def test_narrower_grids_leave_constant_channels_alone():
    rows = torch.tensor([[0.7] * 5, [-1.0, 0.0, 0.5, 1.0, 2.0]]).double()
    top, full = _full(rows)
    for scale, zero in narrower_grids(rows, top, full, zero_is_fixed=False):
        assert (scale[0], zero[0]) == (full[0][0], full[1][0])
        assert bool((scale[1] <= 1.06 * full[0][1]).all())
