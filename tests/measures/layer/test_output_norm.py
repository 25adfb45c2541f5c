"""Output norms against outputs computed by hand."""

import pytest
import torch
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.output_norm import output_norm
from lightning_caq.network.layers import find_layers


def test_output_norm_is_that_of_the_layer_and_what_follows():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(6, 3)
    blocks = record_blocks(net, find_layers(net, x), x)
    for name, end in (("0", 2), ("2", 3)):
        expected = net[:end](x).detach().square().sum(1).mean().sqrt()
        assert output_norm(blocks[name]) == pytest.approx(float(expected))


def test_output_norm_of_a_table_is_that_of_a_word():
    table = nn.Embedding(5, 3)
    tokens = torch.randint(0, 5, (4, 7))
    norm = output_norm(record_blocks(table, find_layers(table, tokens), tokens)[""])
    assert norm == pytest.approx(float(table(tokens).detach().flatten(0, 1).square().sum(1).mean().sqrt()))
