import pytest
import torch
from parts_help import assert_same_by_parts
from torch import nn


def test_a_bilinear_map_by_its_part_is_that_of_torch():
    for bias in (True, False):
        assert_same_by_parts(nn.Bilinear(3, 4, 5, bias=bias), torch.randn(2, 6, 3), torch.randn(2, 6, 4))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_rows_are_those_of_torch(mode):
    for padding in (None, 2):
        net = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding)
        assert_same_by_parts(net, torch.randint(7, (4, 5)))
        assert_same_by_parts(net, torch.randint(7, (9,)), torch.tensor([0, 2, 2, 6]))  # one of them is empty
    last = nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=True)
    assert_same_by_parts(last, torch.randint(7, (9,)), torch.tensor([0, 4, 9]))


def test_rows_of_a_bag_can_have_weights():
    assert_same_by_parts(
        nn.EmbeddingBag(7, 3, mode="sum"), torch.randint(7, (4, 5)), per_sample_weights=torch.rand(4, 5)
    )


def test_a_layer_with_inputs_before_outputs():
    layers = pytest.importorskip("transformers.pytorch_utils")
    assert_same_by_parts(layers.Conv1D(5, 3), torch.randn(2, 4, 3))
