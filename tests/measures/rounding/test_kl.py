"""Divergences with one layer rounded, against dense networks in float64."""

import nets
import pytest
import torch
from dense_case import DenseCase
from every import every
from torch import nn

from lightning_caq.measures.rounding.kl import quantized_kl
from lightning_caq.network.layers import find_layers


@every("name", nets.CASES)
def test_quantized_kl_and_the_weights_are_put_back(name):
    setup = DenseCase(name)
    deltas = {x.name: {b: 2.0**-b * torch.randn(x.shape, dtype=torch.float64) for b in (2, 4)} for x in setup.layers}
    before = setup.dense.vector.clone()
    found = quantized_kl(setup.net, setup.layers, setup.batches, deltas)
    loss = nets.distill_loss(setup.case)
    for name in setup.names:
        for b, delta in deltas[name].items():
            moved = torch.cat(
                [w.flatten() + (delta.flatten() if n == name else 0) for n, w in setup.parts(before).items()]
            )
            assert found[name][b] == pytest.approx(float(loss(setup.dense.call(moved)).detach()), rel=1e-8)
    assert torch.equal(nets.Dense(setup.net, setup.names).vector, before)


def test_a_layer_that_no_batch_reaches_changes_nothing():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    deltas = {name: {4: torch.ones(2, 3, dtype=torch.float64)} for name in ("used", "idle")}
    assert quantized_kl(net, layers, [batch], deltas)["idle"][4] == pytest.approx(0, abs=1e-12)
