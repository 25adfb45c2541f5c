from __future__ import annotations

import nets
import pytest
import torch

from lightning_caq.evaluation.loss_gap import loss_gaps
from lightning_caq.measures.hessian.validity import tolerated_gap
from lightning_caq.measures.measure import measure


def test_gaps_are_those_of_dense_derivatives() -> None:
    case = nets.make_case("mlp")
    profile = measure(case.net, case.batches, needs=frozenset({"loss_change"}), bits=(2, 4), samples=8)
    dense = nets.Dense(case.net, [row.name for row in profile.layers])
    hessian = dense.blocks(dense.hessian(nets.distill_loss(case)))
    loss = nets.distill_loss(case)
    compared = 0
    for gap in loss_gaps(profile):
        i = [row.name for row in profile.layers].index(gap.name)
        from lightning_caq.measures.rounding.rounding_errors import nearest_errors
        from lightning_caq.network.layers import find_layers

        layer = next(x for x in find_layers(case.net, case.batches[0]) if x.name == gap.name)
        delta = nearest_errors(case.net, layer, [gap.bits])[gap.bits].flatten()
        assert gap.distance == pytest.approx(float(delta.norm()))
        assert gap.predicted == pytest.approx(float(delta @ hessian[i] @ delta) / 2, rel=1e-4)
        if gap.actual is not None:
            moved = dense.vector.clone()
            start = sum(dense.sizes[:i])
            moved[start : start + dense.sizes[i]] += delta
            with torch.no_grad():
                assert gap.actual == pytest.approx(float(loss(dense.call(moved))), rel=1e-4)
            assert gap.outside == (gap.gap > tolerated_gap(gap.actual))
            compared += 1
    assert compared >= 2
