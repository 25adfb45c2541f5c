"""What a few runs on one batch find out about a network, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.forward import run_model
from lightning_caq.network.prepare import ModelUse, prepare

X, Z = torch.randn(6, 3), torch.randn(6, 2)


class Net(nn.Module):
    """Two layers, put together by a function of the module and the inputs."""

    def __init__(self, function, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
        self._function = function

    def forward(self, x):
        return self._function(self.layers, x)


def _prepared(net, data, **use):
    return prepare(net.eval(), [data], 99, use=ModelUse(**use))[0]


def test_batches_that_are_cut_know_how_the_network_is_run():
    batches = prepare(nn.Linear(3, 4), [(X, torch.zeros(6).long())] * 3, 8)
    assert [batch.size for batch in batches] == [6, 2]
    assert run_model(nn.Linear(3, 4), batches[1]).values.shape == (2, 4)
    assert prepare(nn.Linear(3, 4), batches, 7)[0] is batches[0]  # taken as they are


def test_optional_masks_are_passed_and_labels_are_not():
    seen = []

    class Masked(nn.Module):
        def forward(self, x, mask=None):
            seen.append(mask is not None)
            return x

    for data, passed in (((X, torch.ones(6), torch.zeros(6)), True), ((X, torch.zeros(6).long()), False)):
        seen.clear()
        _prepared(Masked(), data)
        assert set(seen) == {passed}


def test_the_training_loss_tells_how_the_module_is_run():
    class Masked(nn.Module):
        def forward(self, x, y=None):
            return x if y is None else x * y[:, None]

    data = (X, torch.full((6,), 2.0), torch.zeros(6).long())
    loss = lambda model, batch: F.cross_entropy(model(batch[0], batch[1]), batch[2])  # noqa: E731
    (batch,) = prepare(Masked(), [data], 99, loss=loss)
    assert torch.equal(run_model(Masked(), batch).values, 2 * X)
    assert "cross_entropy" in batch.forward.notes[0]


def test_a_module_without_forward_is_run_by_its_loss():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 4)

    loss = lambda model, batch: F.cross_entropy(model.net(batch[0]), batch[1])  # noqa: E731
    net, data = Bare(), (X, torch.zeros(6).long())
    (batch,) = prepare(net, [data], 99, loss=loss, task=True)
    assert torch.equal(run_model(net, batch).values, net.net(X))
    with pytest.raises(CalibrationError, match=r"Bare has no forward; give forward_fn"):
        prepare(net, [data], 99)


def test_the_user_says_how_it_is_run_and_what_counts():
    net = nn.Linear(3, 4)
    batch = _prepared(net, {"deep": [X]}, forward_fn=lambda model, data: model(data["deep"][0]))
    assert batch.size == 6
    picked = _prepared(Net(lambda f, x: {"a": f[0](x), "b": f[1](x)}), X, output=lambda outputs: outputs["b"])
    assert [head.path for head in picked.forward.heads] == [()]


def test_dotted_paths_are_imported():
    assert ModelUse(forward_fn="torch.nn.functional.relu").forward_fn is F.relu
    for use in ({"forward_fn": "no.such.thing"}, {"output": "torch.nothing"}):
        with pytest.raises(OptionError, match="cannot be imported"):
            ModelUse(**use)


@every("use", [{"output": "scores"}, {"output": 3}, {"class_axis": 1.0}, {"class_axis": True}, {"forward_fn": 3}])
def test_bad_options(use):
    with pytest.raises(OptionError, match=next(iter(use))):
        ModelUse(**use)


def test_values_are_standardised_over_all_batches():
    data = [(X, torch.randn(6, 3)), (X + 5, torch.randn(6, 3))]
    net = nn.Linear(3, 3)
    batches = prepare(net, data, 99)
    outputs = torch.cat([run_model(net, batch).values for batch in batches]).detach()
    torch.testing.assert_close(outputs.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(3))


def test_columns_that_do_not_vary_do_not_outweigh_the_others():
    class Level(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], torch.full((len(x),), 3.0)], 1)

    (head,) = _prepared(Level(), X, output="values").forward.heads
    assert 0.1 < float(head.std[1] / head.std[0]) < 10
    (head,) = _prepared(nn.Identity(), torch.full((4, 2), 5.0), output="values").forward.heads
    assert bool((head.std > 0).all())


def test_several_outputs_are_of_the_same_size():
    net = Net(lambda f, x: (100 * f[0](x), 0.01 * f[1](x)))
    batch = _prepared(net, X)
    with torch.no_grad():
        outputs = run_model(net, batch)
    sizes = [float(outputs.values[:, p.start : p.stop].square().sum(1).mean()) for p in outputs.parts]
    assert sizes == pytest.approx([1, 1], rel=1e-4)


def test_an_output_that_is_the_same_for_all_samples_is_named_and_left_out():
    net = Net(lambda f, x: {"scores": f[0](x), "table": f[1].weight})
    batch = _prepared(net, X)
    assert [head.name for head in batch.forward.heads] == ["scores"]
    assert any("table" in note and "do not count" in note for note in batch.forward.notes)


def test_gradients_pass_where_a_layer_would_be_unseen_and_only_there():
    def cut(f, x):
        with torch.no_grad():
            h = f[0](x)
        return f[1](h)

    for function in (cut, lambda f, x: f[1](f[0](x).detach())):
        net = Net(function)
        batch = _prepared(net, X)
        assert batch.forward.through
        assert any("'layers.0'" in note for note in batch.forward.notes)
        run_model(net, batch).values.sum().backward()
        assert net.layers[0].weight.grad.abs().sum() > 0
    straight = Net(lambda f, x: f[1](x + (f[0](x).round() - f[0](x)).detach() + f[0](x)))
    assert not _prepared(straight, X).forward.through  # a straight-through estimator means what it says


def test_a_layer_that_no_gradient_reaches_is_named():
    net = Net(lambda f, x: f[1](x) + f[0](x).argmax(1, keepdim=True))
    assert any("'layers.0'" in note and "cannot be seen" in note for note in _prepared(net, X).forward.notes)


def test_a_network_that_draws_random_numbers_gives_the_same_twice():
    net = Net(lambda f, x: f[1](f[0](x) + torch.randn_like(x)))
    batch = _prepared(net, X)
    assert batch.forward.random
    assert batch.size == 6
    assert torch.equal(run_model(net, batch).values, run_model(net, batch).values)


def test_outputs_whose_shape_depends_on_the_weights_are_refused():
    net = Net(lambda f, x: (y := f[0](x).flatten())[y > y.mean() + 0.1 * y.std()])
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"shapes of what Net returns change with its weights.*give output"):
        _prepared(net, torch.randn(500, 3))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_nan_labels_are_not_looked_at_and_nan_inputs_are_refused():
    labels = torch.full((6,), float("nan"))
    assert _prepared(nn.Linear(3, 2), (X, labels)).size == 6
    with pytest.raises(CalibrationError, match="Calibration batch 1 holds NaN"):
        prepare(nn.Linear(3, 2), [(X, labels), (X * float("nan"), labels)], 99)


def test_minus_infinity_is_allowed_in_masks():
    class Attending(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(1)

    mask = torch.zeros(6, 3)
    mask[:, 2] = float("-inf")
    assert _prepared(Attending(), {"x": X, "mask": mask}).size == 6


@every(
    ("net", "data", "message"),
    [
        (nn.Linear(4, 1), X, r"Linear cannot take a calibration batch of float32\[6, 3\].*forward_fn"),
        (Net(lambda f, x: "text"), X, "returned no floating-point tensor.*forward_fn"),
        (Net(lambda f, x: f[0](x) / 0), X, "NaN or infinite outputs.*output"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(net, data, message):
    with pytest.raises(CalibrationError, match=message):
        _prepared(net, data)
