"""ACIQ against numerical integration and minimisation."""

import numpy as np
import pytest
import torch
from every import every
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import laplace, norm

from lightning_caq.quantizers.grids.aciq import clipping, gauss_clip, laplace_clip


@every(("density", "clip"), [(laplace(), laplace_clip), (norm(), gauss_clip)])
def test_clip_minimises_the_expected_error(density, clip):
    for bits in (1, 2, 3, 4, 6, 8):

        def expected(alpha, noise=1 / (3 * 4**bits)):
            cut = 2 * quad(lambda x: (x - alpha) ** 2 * density.pdf(x), alpha, np.inf, epsabs=1e-14)[0]
            return cut + alpha**2 * noise

        best = minimize_scalar(expected, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-10}).x
        assert clip(bits) == pytest.approx(best, rel=1e-3)


def test_each_channel_is_clipped_for_its_own_bits():
    w = torch.from_numpy(laplace().rvs((2, 2000), random_state=0))
    low, high = clipping(w, torch.tensor([[2], [4]]), centred=False)
    for row, bits in enumerate((2, 4)):
        alone = clipping(w[row : row + 1], torch.tensor([[bits]]), centred=False)
        assert torch.equal(torch.cat([low, high], 1)[row], torch.cat(alone, 1)[0])


@every(("density", "clip"), [(laplace, laplace_clip), (norm, gauss_clip)])
def test_the_likelier_distribution_is_taken(density, clip):
    w = torch.from_numpy(density(loc=0.5).rvs((1, 20_000), random_state=0))
    low, high = clipping(w, torch.tensor([[3]]), centred=False)
    assert float(high - low) / 2 / (1 - 2**-3) == pytest.approx(clip(3), rel=0.03)
    assert float(high + low) / 2 == pytest.approx(0.5, abs=0.03)
    assert torch.equal(*(x.abs() for x in clipping(w, torch.tensor([[3]]), centred=True)))
