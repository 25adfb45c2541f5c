"""Gauss–Newton products against dense Jacobians and output Hessians by torch.func, in float64."""

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn
from torch.func import hessian

from lightning_caq.errors import CalibrationError
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.gauss_newton import GaussNewton
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.hutchinson import estimate_layer_traces
from lightning_caq.measures.hessian.lanczos import lanczos
from lightning_caq.network.batches import batch_size
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.seeding import generator


class Setup:
    def __init__(self, name):
        self.case = nets.make_case(name)
        self.case.net.requires_grad_(True)
        self.net, self.batches = self.case.net, self.case.batches
        self.layers = find_layers(self.net, self.batches[0])
        self.dense = nets.Dense(self.net, [x.name for x in self.layers])

    def matrix(self, losses):
        """Σ_b N_b/N Jᵀ H J, with a loss of the rows for every batch."""
        sizes = [batch_size(batch) for batch in self.batches]
        total = torch.zeros(len(self.dense.vector), len(self.dense.vector), dtype=torch.float64)
        for size, batch, loss in zip(sizes, self.batches, losses, strict=True):
            rows = self.case.output(self.net, batch).detach()
            jacobian = self.dense.jacobian(lambda net, batch=batch: self.case.output(net, batch)).flatten(0, 1)
            inner = hessian(lambda z, shape=rows.shape, loss=loss: loss(z.reshape(shape)))(rows.flatten())
            total += size / sum(sizes) * jacobian.T @ inner @ jacobian
        return total

    def check(self, operator, matrix):
        vector = torch.randn(operator.size, dtype=torch.float64)
        for _ in range(2):  # from kept graphs too
            torch.testing.assert_close(operator.product(vector), matrix @ vector, rtol=1e-8, atol=1e-11)
            parts = operator.split(vector)
            images, blocks = operator.layer_products(parts), self.dense.blocks(matrix)
            for image, block, v in zip(images, blocks, parts, strict=True):
                torch.testing.assert_close(image.flatten(), block @ v.flatten(), rtol=1e-8, atol=1e-11)
            forms = [float(v.flatten() @ b @ v.flatten()) for b, v in zip(blocks, parts, strict=True)]
            assert operator.layer_quadratics(parts) == pytest.approx(forms, rel=1e-8)


@every("name", nets.CASES)
@every("graph_memory", [0, 2**30])
def test_distill_is_the_hessian_and_the_gram_route(name, graph_memory):
    setup = Setup(name)
    operator = GaussNewton(setup.net, setup.layers, setup.batches, graph_memory=graph_memory)
    matrix = nets.gauss_newton(setup.case, setup.dense)
    setup.check(operator, matrix)
    assert operator.kept == (len(setup.batches) if graph_memory else 0)
    vector = torch.randn(operator.size, dtype=torch.float64)
    whole = Hessian(setup.net, setup.layers, make_objective("distill", setup.net, setup.batches))
    torch.testing.assert_close(operator.product(vector), whole.product(vector), rtol=1e-7, atol=1e-10)
    assert (operator.size, operator.sizes) == (whole.size, whole.sizes)
    spectrum = gram_spectrum(
        setup.net, setup.layers, setup.batches, {x.name: {} for x in setup.layers}, k=3, tolerance=0.0
    )
    pairs = lanczos(operator.product, vector, 3, tolerance=1e-8)
    torch.testing.assert_close(pairs.values, spectrum.values[:3], rtol=1e-6, atol=1e-12)


@every("name", nets.CASES)
def test_cross_entropy_with_labels_and_squared_error(name):
    setup = Setup(name)
    columns = setup.case.output(setup.net, setup.batches[0]).shape[1]
    counts = [len(setup.case.output(setup.net, batch)) for batch in setup.batches]
    labels = [torch.randint(0, columns, (count,)) for count in counts]
    targets = [torch.randn(count, columns, dtype=torch.float64) for count in counts]
    number = {id(batch): i for i, batch in enumerate(setup.batches)}
    for loss, known in ((F.cross_entropy, labels), (F.mse_loss, targets), (F.smooth_l1_loss, targets)):
        operator = GaussNewton(
            setup.net,
            setup.layers,
            setup.batches,
            lambda z, batch, loss=loss, known=known: loss(z.reshape(-1, columns), known[number[id(batch)]]),
        )
        setup.check(operator, setup.matrix([lambda z, y=y, loss=loss: loss(z, y) for y in known]))


def test_traces_by_hutchinson():
    setup = Setup("cnn")
    operator = GaussNewton(setup.net, setup.layers, setup.batches)
    found = estimate_layer_traces(operator, [generator(0, x.name) for x in setup.layers], max_probes=64)
    blocks = setup.dense.blocks(nets.gauss_newton(setup.case, setup.dense))
    for value, error, block in zip(found.values, found.errors, blocks, strict=True):
        assert abs(float(value - block.trace())) <= 4.5 * float(error) + 1e-9


def test_nothing_bends():
    """A loss that is linear in the outputs has no curvature; a layer that no batch reaches has none either."""
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    x = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    vector = torch.ones(12, dtype=torch.float64)
    assert not GaussNewton(net, layers, [x], lambda z, batch: z.mean()).product(vector).any()
    used, idle = GaussNewton(net, layers, [x]).layer_products([torch.ones_like(net["used"].weight)] * 2)
    assert used.any()
    assert not idle.any()


def test_bad_losses_are_refused():
    setup = Setup("mlp")
    for loss in (lambda z, batch: z.square(), lambda z, batch: z.sum() * float("nan")):
        operator = GaussNewton(setup.net, setup.layers, setup.batches, loss)
        with pytest.raises(CalibrationError, match="batch 0 must be one finite number"):
            operator.product(torch.ones(operator.size, dtype=torch.float64))
