"""Products with the Hessian against dense Hessians in float64."""

import nets
import pytest
import torch
from every import every

from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.sharing import Sharing


def _task(net, batch):
    return nets.task_loss(run_model(net, batch).values)


@every("name", nets.CASES)
@every("objective", ["task", "distill"])
def test_equals_dense_hessian(name, objective):
    case = nets.make_case(name)
    case.net.requires_grad_(True)  # `measure` lets autograd see frozen weights; here it is done by hand
    layers = find_layers(case.net, case.batches[0])
    operator = Hessian(case.net, layers, make_objective(objective, case.net, case.batches, _task))
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    expected = dense.hessian(loss)
    assert operator.size == len(expected)
    assert expected.norm() > 1e-3
    columns = torch.stack([operator.product(unit) for unit in torch.eye(operator.size, dtype=torch.float64)])
    torch.testing.assert_close(columns, expected, rtol=1e-8, atol=1e-10)

    vectors = operator.split(torch.randn(operator.size, dtype=torch.float64))
    quadratics = [v.flatten() @ b @ v.flatten() for v, b in zip(vectors, dense.blocks(expected), strict=True)]
    assert operator.layer_quadratics(vectors) == pytest.approx([float(q) for q in quadratics], rel=1e-8, abs=1e-10)

    slope = torch.func.grad(lambda vector: loss(dense.call(vector)))(dense.vector)
    torch.testing.assert_close(torch.cat([g.flatten() for g in operator.gradient()]), slope, rtol=1e-8, atol=1e-10)


def test_task_hessian_of_the_cases_is_indefinite():
    case = nets.make_case("mlp")
    values = torch.linalg.eigvalsh(nets.Dense(case.net, ["0", "2"]).hessian(lambda net: nets.loss_of(case, net)))
    assert values.min() < -1e-3 < 1e-3 < values.max()


def test_works_where_gradients_are_off():
    case = nets.make_case("mlp")
    operator = Hessian(
        case.net, find_layers(case.net, case.batches[0]), make_objective("task", case.net, case.batches, _task)
    )
    v = torch.randn(operator.size, dtype=torch.float64)
    expected = operator.product(v)
    with torch.no_grad():
        assert torch.equal(operator.product(v), expected)


def test_a_layer_that_is_not_used_has_no_curvature():
    net = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "idle": torch.nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    assert [x.name for x in layers] == ["used", "idle"]
    product = Hessian(net, layers, make_objective("distill", net, [batch])).product(torch.ones(12, dtype=torch.float64))
    assert product[:6].norm() > 0
    assert torch.equal(product[6:], torch.zeros(6, dtype=torch.float64))


@every("graph_memory", [0, 10_000, 2**30])
def test_graphs_are_kept_only_within_memory(graph_memory):
    """Batches whose graphs do not fit are built anew each time; the products are the same."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(4)]
    layers = find_layers(net, batches[0])
    objective = make_objective("distill", net, batches)
    v = torch.randn(sum(layer.weights for layer in layers))
    operator = Hessian(net, layers, objective, graph_memory=graph_memory)
    first, second = operator.product(v), operator.product(v)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, Hessian(net, layers, objective).product(v), rtol=0, atol=0)
    assert operator.kept == {0: 0, 2**30: 4}.get(graph_memory, operator.kept)
    assert 0 < operator.kept < 4 or graph_memory != 10_000


def test_layer_products_are_the_blocks_of_the_dense_hessian():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double().eval()
    x = torch.randn(7, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    objective = make_objective("distill", net, [x])
    operator = Hessian(net, layers, objective)
    columns = [operator.product(e) for e in torch.eye(operator.size, dtype=torch.float64)]
    dense, (a, _) = torch.stack(columns), operator.sizes
    v = torch.randn(operator.size, dtype=torch.float64)
    first, second = operator.layer_products(operator.split(v))
    torch.testing.assert_close(first.flatten(), dense[:a, :a] @ v[:a])
    torch.testing.assert_close(second.flatten(), dense[a:, a:] @ v[a:])


class Apart(Sharing):
    """A rank that keeps what is its own."""

    def sum(self, tensor, what):
        return tensor


@every("name", nets.CASES)
@every("objective", ["task", "distill"])
@every("ranks", [2, 4])  # the cases have two batches: dealt out whole, and cut
def test_parts_of_the_ranks_add_up_to_the_dense_hessian(name, objective, ranks):
    case = nets.make_case(name)
    case.net.requires_grad_(True)
    layers = find_layers(case.net, case.batches[0])
    target = make_objective(objective, case.net, case.batches, _task)
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    expected = dense.hessian(loss)
    v = torch.randn(len(expected), dtype=torch.float64)
    parts = [Hessian(case.net, layers, target, sharing=Apart(rank, ranks)).product(v).clone() for rank in range(ranks)]
    torch.testing.assert_close(torch.stack(parts).sum(0), expected @ v, rtol=1e-8, atol=1e-10)
    assert sum(bool(part.any()) for part in parts) >= 2
