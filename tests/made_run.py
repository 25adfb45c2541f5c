"""A run made up from plain numbers, for every test and benchmark that draws one."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.report import LayerRow, QuantizationReport, Size
from lightning_caq.studies import (
    Energy,
    EpochCurvature,
    Landscape,
    LayerRate,
    LayerReason,
    RateLimit,
    RatePoint,
    Studies,
    SweepPoint,
    Tightness,
)

CYCLE = (2, 3, 4, 5, 6, 8)


def resnet50_names() -> list[str]:
    """The 54 layers of torchvision's ResNet-50, in order of execution."""
    names = ["conv1"]
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            names += [f"layer{stage}.{block}.conv{i}" for i in (1, 2, 3)]
            names += [f"layer{stage}.0.downsample.0"] * (block == 0)
    return [*names, "fc"]


def made_run(names: Sequence[str]) -> tuple[QuantizationReport, CurvatureProfile]:
    """A run in which everything was measured and studied; the numbers differ from layer to layer."""
    rows, layers, n = [], [], len(names)
    for i, name in enumerate(names):
        scale, outside = 2.0 ** -(i % 7), i % 3 == 0
        predicted = {b: 2 * scale * 4.0 ** (2 - b) for b in CYCLE}
        rows.append(
            LayerCurvature(
                name,
                weights=100 * (i + 1),
                channels=10,
                macs=6400,
                kappa=2.0 ** (i % 11),
                kappa_tolerance=0.1,
                lipschitz=1.5 ** (i % 7),
                amplification=1.0 + i % 5,
                carried_error={b: (1.0 + i % 5) * 4.0 * 2.0**-b for b in CYCLE},
                rounding_error={b: 100.0 * (i + 1) * 4.0**-b for b in CYCLE},
                output_error={b: 4.0 * 2.0**-b for b in CYCLE},
                subspace_curvature=scale,
                subspace_energy={b: 0.75 * x for b, x in predicted.items()},
                second_order=predicted,
                first_order=dict.fromkeys(CYCLE, 0.0),
                loss_change={2: 2 * scale, 3: 0.25 * scale} if outside else {2: 1.1 * scale},
                outside=(2,) if outside else (),
            )
        )
        bits = {"quantized": CYCLE[i % 6], "uniform": 3}
        layers.append(LayerRow(name, "conv2d", 100 * (i + 1), 6400, 2.0 ** (i % 11), 1.5, bits))
    axis = tuple(x / 7 - 1 for x in range(15))
    metrics = {"float/val_acc": 0.915, "quantized/val_acc": 0.9, "uniform/val_acc": 0.85, "float/val_loss": 0.3}
    studies = Studies(
        alone={name: 0.5 + 0.01 * i for i, name in enumerate(names)},
        energies={row.name: Energy(0.01 * row.second_order[2], 0.2 * row.second_order[2]) for row in rows},
        tightness={b: Tightness(2.0**-b, 3 * 2.0**-b, 2 * 2.0**-b, 2.0**-b, 2.0**-b, 90 * 2.0**-b) for b in CYCLE},
        landscape=Landscape(
            axis, axis, tuple(tuple(4 * s * s + t * t for s in axis) for t in axis), (8.0, 2.0),
            tuple((0.1 * i / n, 0.8 * i / n) for i in range(n + 1)), 0.25,
        ),
        points=tuple(
            SweepPoint(method, bits, 32 / bits, {"val_acc": 0.9 - 0.1 / bits + 0.01 * seed})
            for method in ("cet", "uniform")
            for bits in (2.0, 4.0)
            for seed in range(3)
        ),
        eigenpairs=tuple(SweepPoint("cet", 3.0, 10.0, {"val_loss": 1 / k}, eigenpairs=k) for k in (50, 100, 200)),
        training=tuple(
            EpochCurvature(epoch, {
                f"{measure}/{row.name}": value / (1 + epoch) for row in rows for measure, value in (
                    ("kappa", row.kappa), ("lipschitz", row.lipschitz), ("trace", row.subspace_curvature),
                    ("top_eigenvalue", 0.5 * row.subspace_curvature),
                )
            }) for epoch in range(3)
        ),
    )  # fmt: skip
    report = QuantizationReport(
        method="cet",
        budget="avg_bits=3",
        layers=tuple(layers),
        sizes={
            "float": Size(32.0, 1.0, 4000),
            "quantized": Size(2.96, 10.26, 390),
            "uniform": Size(3.0, 10.1, 396),
        },
        metrics=metrics,
        predicted_loss={"quantized": 0.02},
        options={"method": "cet", "avg_bits": 3.0, "ratio": None, "bits": [2, 3, 4], "seed": 7},
        versions={"python": "3.11", "torch": "2.9"},
        seconds={"rounding": 1.5},
        notes=("A note <of> the run.",),
        reasons=tuple(
            LayerReason(
                name=row.name,
                method="cet",
                unit="nat",
                bits=row.bits["quantized"],
                fewer=row.bits["quantized"] - 1,
                more=row.bits["quantized"] + 1,
                damage=0.01 * 2.0 ** (i % 7),
                damage_fewer=0.05 * 2.0 ** (i % 7),
                damage_more=0.002 * 2.0 ** (i % 7),
                weights=row.weights,
                source="modelled",
            )
            for i, row in enumerate(layers)
        ),
        studies=studies,
        rate_limit=RateLimit(
            tuple(LayerRate(name, 100, 2.0, 1.6, 1e-3) for name in names),
            (RatePoint(1.9, 0.12), RatePoint(2.0, 0.1), RatePoint(2.6, 0.05)),
        ),
    )
    return report, CurvatureProfile(tuple(rows), samples=256, eigenvalues=(4.0, 2.0, 1.0), trace=8.0)
