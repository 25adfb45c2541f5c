import torch
from torch import nn

from lightning_caq.network.parts.part import View, make_part, weight_identity


def test_views_lie_in_the_memory_of_the_parameter():
    whole = torch.arange(24.0).reshape(2, 3, 4)
    expected = {
        View("w", index=1): whole[1],
        View("w", rows=(1, 2)): whole[1:2],
        View("w", index=0, transposed=True): whole[0].T,
        View("w", flat=True): whole.reshape(2, 12),
    }
    for view, values in expected.items():
        assert torch.equal(view.of(whole), values)
        assert view.of(whole).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_gradient_by_a_part_goes_to_the_parameter_it_lies_in():
    net = nn.MultiheadAttention(2, 1)
    make_part(net, View("in_proj_weight", rows=(2, 4)))(torch.ones(1, 2)).sum().backward()
    assert net.in_proj_weight.grad.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [0, 0], [0, 0]]


def test_parts_of_one_parameter_are_told_apart_by_their_place():
    net = nn.MultiheadAttention(2, 1)
    first, again, second = (make_part(net, View("in_proj_weight", rows=rows)) for rows in ((0, 2), (0, 2), (2, 4)))
    assert weight_identity(first) == weight_identity(again) != weight_identity(second)
