import itertools

import pytest
import torch
from parts_help import assert_same_by_parts
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

LENGTHS = torch.tensor([3, 6, 1, 2, 6])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_by_parts_is_that_of_torch(kind):
    for two, both, first, bias in itertools.product([False, True], repeat=4):
        net = kind(3, 4, num_layers=1 + two, bidirectional=both, batch_first=first, bias=bias)
        x = torch.randn(5, 6, 3) if first else torch.randn(6, 5, 3)
        h = torch.randn((1 + two) * (1 + both), 5, 4)
        assert_same_by_parts(net, x)
        assert_same_by_parts(net, x, (h, h.flip(1)) if kind is nn.LSTM else h)
        assert_same_by_parts(net, pack_padded_sequence(x, LENGTHS, batch_first=first, enforce_sorted=False))
    assert_same_by_parts(net, x[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_states_and_relu():
    for both in (False, True):
        assert_same_by_parts(nn.LSTM(3, 4, 2, proj_size=2, bidirectional=both), torch.randn(6, 5, 3))
    assert_same_by_parts(nn.RNN(3, 4, nonlinearity="relu"), torch.randn(6, 5, 3))


def test_cells():
    for cell in (nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4), nn.RNNCell(3, 4, nonlinearity="relu")):
        assert_same_by_parts(cell, torch.randn(5, 3))
        assert_same_by_parts(cell, torch.randn(3))
    assert_same_by_parts(nn.LSTMCell(3, 4, bias=False), torch.randn(5, 3), (torch.randn(5, 4), torch.randn(5, 4)))


def test_gradients_reach_the_parameters_of_torch():
    from lightning_caq.network.parts.expand import expanded

    net, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(6, 5, 3)
    net(x)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    with expanded(net):
        handles = [part.register_forward_hook(lambda m, a, y: None) for part in net.children()]
        net.zero_grad()
        net(x)[0].square().sum().backward()
        for handle in handles:
            handle.remove()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
