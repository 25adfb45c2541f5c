"""Where samples lie is found by running one, two and all of them; what cannot be cut is left whole."""

import torch
from every import every
from torch import nn

from lightning_caq.network.cutting import find_axes

MIX = torch.randn(5, 5)
FAILURES = (RuntimeError, LookupError, ValueError, TypeError)


def _axes(run, data):
    with torch.no_grad():
        return find_axes(run, data, run(data), lambda path: True, FAILURES)


def test_a_time_first_network_is_cut_along_its_second_axis():
    torch.manual_seed(0)
    for batch_first, axis in ((True, 0), (False, 1)):
        rnn = nn.GRU(3, 4, batch_first=batch_first)
        for shape in ((6, 9, 3), (5, 5, 3)):  # as many steps as samples too
            assert _axes(lambda x, rnn=rnn: rnn(x)[0], torch.randn(shape)) == ({(): axis}, {(): axis})


def test_constants_scalars_and_tables_are_not_cut():
    data = {
        "table": torch.randn(1, 5),
        "x": torch.randn(7, 5),
        "scale": torch.tensor(2.0),
        "weights": torch.randn(7),  # as long as the batch by chance
        "labels": torch.zeros(7),
    }

    def run(data):
        mixed = data["x"] @ torch.ones(5, 2) * data["scale"] + data["table"].sum()
        return mixed * data["weights"].sum()

    axes, outputs = _axes(run, data)
    assert axes == {("x",): 0, ("labels",): 0}
    assert outputs == {(): 0}


def test_rows_of_a_sample_may_share_the_axis_of_samples():
    axes, outputs = _axes(lambda x: x.flatten(0, 1), torch.randn(4, 3, 2))
    assert (axes, outputs) == ({(): 0}, {(): 0})


def test_samples_that_are_shorter_alone_are_found_all_the_same():
    def run(data):
        x, lengths = data
        return x[:, : int(lengths.max())]

    axes, outputs = _axes(run, (torch.randn(4, 6, 2), torch.tensor([2, 6, 3, 4])))
    assert axes == {(0,): 0, (1,): 0}
    assert outputs == {(): 0}


@every(
    "run",
    [
        lambda x: x @ x.T,  # pairs of samples
        lambda x: (x - x.mean()) / x.std(),  # statistics of the batch
        lambda x: x[torch.tensor([3, 4, 0, 1, 2])] @ MIX,  # rows that point at each other
        lambda x: x.softmax(0) + x.softmax(1),
    ],
)
def test_outputs_that_depend_on_other_samples_are_not_cut(run):
    assert _axes(run, torch.randn(5, 5)) is None


def test_nodes_and_edges_are_not_cut():
    x, edges = torch.randn(8, 3), torch.randint(0, 8, (2, 20))

    def run(data):
        nodes, (source, target) = data
        return nodes.index_add(0, target, nodes[source]) @ MIX[:3, :3]

    assert _axes(run, (x, edges)) is None


def test_a_single_sample_has_an_axis_to_be_repeated_along():
    assert _axes(lambda x: 2 * x, torch.randn(1, 3)) == ({(): 0}, {(): 0})
