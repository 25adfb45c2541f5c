import pytest
import torch
from torch import nn

from lightning_caq.network.parts.expand import collapse, every_weight_a_layer, expand, expanded, split_weights


def test_parts_hold_the_memory_of_the_parameters_in_their_place():
    net = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 3))
    before = list(net.named_parameters())
    with every_weight_a_layer(net):
        names = {name for name, p in net.named_parameters() if p.ndim > 1}
        assert names == {f"0.{x}_proj.weight" for x in ("q", "k", "v", "out")} | {"1.ih_l0.weight", "1.hh_l0.weight"}
        assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
        with torch.no_grad():
            net[0].k_proj.weight.fill_(2.0)
        assert net[0].in_proj_weight[4:8].eq(2).all()
        assert not net[0].in_proj_weight[:4].eq(2).any()
    assert [(name, id(p)) for name, p in net.named_parameters()] == [(name, id(p)) for name, p in before]


def test_weights_that_were_moved_to_other_memory_come_back():
    net = nn.LSTM(4, 3)
    with every_weight_a_layer(net):
        net.hh_l0.weight.data = torch.ones(12, 3)
    assert net.weight_hh_l0.eq(1).all()


def test_whatever_happens_inside_the_network_is_what_it_was():
    net = nn.TransformerEncoderLayer(4, 2, 8)
    classes, keys = [type(m) for m in net.modules()], list(net.state_dict())

    def fail() -> None:
        with every_weight_a_layer(net):
            assert [type(m) for m in net.modules()] != classes
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert ([type(m) for m in net.modules()], list(net.state_dict())) == (classes, keys)


def test_only_what_is_named_is_expanded():
    net = nn.ModuleList([nn.LSTM(2, 3), nn.LSTM(2, 3)])
    expand(net, ["1.hh_l0"])
    assert [type(m).__name__ for m in net] == ["LSTM", "ExpandedLSTM"]
    collapse(list(net))
    assert [type(m).__name__ for m in net] == ["LSTM", "LSTM"]


def test_one_parameter_of_two_modules_is_one_weight():
    net = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)])
    net[1].in_proj_weight = net[0].in_proj_weight
    with expanded(net), split_weights(net):
        assert net[0].q_proj.weight is net[1].q_proj.weight
    assert net[1].in_proj_weight is net[0].in_proj_weight


def test_a_module_with_something_else_under_the_name_of_a_part_is_left_alone():
    net = nn.MultiheadAttention(4, 2)
    net.q_proj = nn.Identity()
    with expanded(net):
        assert type(net) is nn.MultiheadAttention
