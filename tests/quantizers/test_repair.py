"""Repairs against statistics measured by hand."""

import copy

import nets
import torch
from every import every
from torch import nn

from lightning_caq.network.batches import split_samples
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.repair import Repair, measure_moments, move_statistics, prepare_repair, repairable


def _round(net, bits=2):
    """Nearest rounding of everything, in place."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                shape = (-1, *[1] * (module.weight.ndim - 1))
                grid = fit_grid(module.weight, bits, tuple(torch.empty(len(module.weight)).reshape(shape).shape))
                module.weight.copy_(grid.nearest(module.weight))
    return net


def _seen(net, name, x, what):
    """What enters (or leaves) a module, channels first, over all samples and positions, in float64."""
    caught = []
    hook = lambda m, args, out: caught.append((args[0] if what == "input" else out).detach().clone())  # noqa: E731
    handle = net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        net(x)
    handle.remove()
    axis = -1 if isinstance(net.get_submodule(name), nn.Linear) else 1
    return torch.cat([t.double().movedim(axis, 0).flatten(1) for t in caught], dim=1)


def _cnn():
    x, y = nets.images(256, 0)
    return nets.trained(nets.small_cnn(), x, y, steps=40).eval()


def test_batchnorm_moves_by_what_changed_layer_by_layer():
    net, (x, _) = _cnn(), nets.images(60, 1)
    batches = [x[:40], x[40:]]
    layers = find_layers(net, x)
    modules = repairable(net, layers)
    assert list(modules) == ["1", "5", "10"]
    reference = measure_moments(net, modules, batches)
    float_net, quantized = copy.deepcopy(net), _round(net)
    expected = copy.deepcopy(quantized)
    for name in ("1", "5"):  # each with the repairs before it in place
        before, after = _seen(float_net, name, x, "input"), _seen(expected, name, x, "input")
        module = expected.get_submodule(name)
        module.running_mean.add_((after.mean(1) - before.mean(1)).float())
        module.running_var.mul_((after.var(1, correction=0) / before.var(1, correction=0)).float())
    shift = _seen(expected, "10", x, "output").mean(1) - _seen(float_net, "10", x, "output").mean(1)
    with torch.no_grad():
        expected[10].bias.sub_(shift.float())

    changed = move_statistics(quantized, modules, reference, batches)
    found = quantized.state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    moved = {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var", "10.bias"}
    assert set(changed) == moved
    assert all(torch.equal(found[key], value) for key, value in changed.items())
    assert not torch.allclose(found["5.running_mean"], float_net.state_dict()["5.running_mean"], atol=1e-3)


@every(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(10, 2)),
    ],
)
def test_bias_correction_makes_mean_errors_vanish(make):
    net, x = make(), torch.randn(80, 6) + 0.5
    layers = find_layers(net, x)
    modules = repairable(net, layers)
    assert len(modules) == len(layers)
    reference = measure_moments(net, modules, [x[:50], x[50:]])
    float_net, quantized = copy.deepcopy(net), _round(net)

    def worst():
        errors = [_seen(quantized, name, x, "output") - _seen(float_net, name, x, "output") for name in modules]
        return max(float(e.mean(1).abs().max()) for e in errors)

    assert worst() > 1e-3
    move_statistics(quantized, modules, reference, [x[:50], x[50:]])
    assert worst() < 1e-6


def test_a_layer_used_twice():
    net, x = nets.Twice(), torch.randn(40, 4)
    modules = repairable(net, find_layers(net, x))
    reference = measure_moments(net, modules, [x])
    before = _seen(net, "first", x, "output").mean(1)
    _round(net)
    move_statistics(net, modules, reference, [x])
    after = _seen(net, "first", x, "output").mean(1)
    # The second call's input moves with the bias too: what is left is of second order.
    assert float((after - before).abs().max()) < 0.1


def test_a_network_of_one_layer():
    net, x = nn.Linear(5, 4), torch.randn(30, 5) + 1
    repair = prepare_repair(net, find_layers(net, x), *halves(net, [x]))
    _round(net)
    changed, note = repair(net)
    assert (list(changed), note) == (["bias"], "")


def test_what_cannot_be_repaired():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.idle, self.fc = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 2, bias=False)
            self.norm = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x):
            return self.norm(self.fc(self.words(x)))

    net, x = Net(), torch.randint(0, 5, (6,))
    assert repairable(net, find_layers(net, x)) == {}


def test_a_constant_channel_keeps_its_variance():
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)).eval()
    with torch.no_grad():
        net[0].weight[0] = 0
    x = torch.randn(20, 3)
    modules = {"1": net[1]}
    reference = measure_moments(net, modules, [x])
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    move_statistics(net, modules, reference, [x])
    torch.testing.assert_close(net[1].running_var, torch.tensor([1.0, 0.25]))


def halves(net, batches):
    """Samples to fit to, and the float outputs for the others."""
    fitted, others = split_samples(batches)
    return fitted, make_reference(net, others)


def _setup_repair():
    net, (x, y) = _cnn(), nets.images(80, 1)
    return net, prepare_repair(net, find_layers(net, x), *halves(net, [(x[:50], y[:50]), (x[50:], y[50:])]))


def test_is_kept_where_it_helps_on_samples_held_out():
    net, repair = _setup_repair()
    _round(net)
    before = repair.held_out.error(net)
    changed, note = repair(net)
    assert note == ""
    assert "1.running_mean" in changed
    assert repair.held_out.error(net) < before


def test_the_samples_it_is_judged_by_are_not_those_it_is_fitted_to():
    _, repair = _setup_repair()
    fitted = torch.cat([x for x, _ in repair.fitted])
    judged = torch.cat([x for x, _ in repair.held_out.batches])
    assert (len(fitted), len(judged)) == (70, 10)
    assert not any(torch.equal(a, b) for a in fitted for b in judged)


def test_is_dropped_where_it_does_not_help():
    net, repair = _setup_repair()
    _round(net)
    odd = [(-7 + 3 * torch.randn(60, 1, 8, 8), None)]  # other samples than the network meets
    float_moments = {name: copy.deepcopy(m) for name, m in repair.reference.items()}
    for moments in float_moments.values():
        moments.count, moments.total, moments.squares = 60, 60 * moments.mean, 60 * (moments.var + moments.mean**2)
        moments.calls = 1
    state = {k: v.clone() for k, v in net.state_dict().items()}
    changed, note = Repair(repair.modules, float_moments, odd, repair.held_out)(net)
    assert changed == {}
    assert note.startswith("output error")
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_one_sample_judges_itself():
    net, x = nn.Linear(5, 4), torch.randn(1, 5)
    repair = prepare_repair(net, find_layers(net, x), *halves(net, [x]))
    assert torch.equal(torch.cat(repair.fitted), x)
    assert torch.equal(torch.cat(repair.held_out.batches), x)
