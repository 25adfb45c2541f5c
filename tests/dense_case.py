"""A small network with everything that dense references take, for the tests of measures."""

import nets
import torch

from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


def _task(net, batch):
    return nets.task_loss(run_model(net, batch).values)


class DenseCase:
    """A network of ``nets``, its layers, and its weights as one vector in float64."""

    def __init__(self, name):
        self.case = nets.make_case(name)
        self.case.net.requires_grad_(True)
        self.net, self.batches = self.case.net, self.case.batches
        self.layers = find_layers(self.net, self.batches[0])
        self.names = [layer.name for layer in self.layers]
        self.dense = nets.Dense(self.net, self.names)

    def objective(self, name):
        return make_objective(name, self.net, self.batches, _task)

    def parts(self, vector):
        return dict(zip(self.names, vector.split(self.dense.sizes), strict=True))

    def gradient(self, case):
        loss = lambda vector: nets.loss_of(case, self.dense.call(vector))  # noqa: E731
        return torch.func.grad(loss)(self.dense.vector).detach()


def layer_calls(case, layer):
    """Module, input and output of every call of a layer, caught by hand."""
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out.clone())))
        for module in {case.net.get_submodule(name) for name in layer.modules}
    ]
    for batch in case.batches:
        case.output(case.net, batch)
    for handle in handles:
        handle.remove()
    return seen
