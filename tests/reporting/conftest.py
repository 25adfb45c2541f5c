from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from made_run import CYCLE, made_run

from lightning_caq.plan import LayerPlan, QuantizationPlan
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.report import LayerRow, QuantizationReport, Size
from lightning_caq.sizes import LayerSizes


@pytest.fixture
def make_report() -> Callable[..., QuantizationReport]:
    """A report on layers of the given names, bits going round and round through 2, 3, 4, 5, 6 and 8."""

    def make(names: list[str], metrics: dict[str, float] | None = None) -> QuantizationReport:
        rows = tuple(
            LayerRow(n, "conv2d", 100 * (i + 1), 6400, 2.0**i, 1.5**i, {"quantized": CYCLE[i % 6], "uniform": 3})
            for i, n in enumerate(names)
        )
        sizes = {"float": Size(32.0, 1.0, 4000), "quantized": Size(2.96, 10.26, 390), "uniform": Size(3.0, 10.1, 396)}
        return QuantizationReport("cet", "avg_bits=3", rows, sizes, metrics or {})

    return make


@pytest.fixture
def make_profile() -> Callable[[list[str]], CurvatureProfile]:
    """A profile of layers of the given names: κ = 2^i with a tolerance of a tenth, L = 1.5^i."""

    def make(names: list[str]) -> CurvatureProfile:
        rows = tuple(
            LayerCurvature(
                n,
                weights=100 * (i + 1),
                channels=10,
                macs=6400,
                kappa=2.0**i,
                kappa_tolerance=0.1,
                lipschitz=1.5**i,
                rounding_error={2: 0.5, 3: 0.25},
                outside=(2, 3),
            )
            for i, n in enumerate(names)
        )
        return CurvatureProfile(rows, samples=256, eigenvalues=(3.0, 1.0))

    return make


@pytest.fixture
def names() -> list[str]:
    return ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"]


@pytest.fixture
def plan(names: list[str]) -> QuantizationPlan:
    layers = tuple(
        LayerPlan(n, (n,), Grid(CYCLE[i], torch.ones(2, 1), torch.zeros(2, 1)), torch.ones(2, 3, dtype=torch.uint8))
        for i, n in enumerate(names)
    )
    return QuantizationPlan("cet", "avg_bits=3", "error_feedback", layers, LayerSizes((6,) * 4, (2,) * 4), "abc")


@pytest.fixture
def make_run() -> Callable[[list[str]], tuple[QuantizationReport, CurvatureProfile]]:
    return made_run
