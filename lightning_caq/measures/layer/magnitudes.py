"""Magnitudes: how large a layer's outputs and weights are."""

from __future__ import annotations

import torch
from torch import nn

from lightning_caq.measures.layer.blocks import Block
from lightning_caq.network.layers import Layer, layer_weight


def output_norm(block: Block) -> float:
    """Root mean square over samples of ‖f_i(z_i)‖, of the layer and what directly follows it; a word's, of a table."""
    with torch.no_grad():
        outputs = block(block.inputs)
    rows = outputs.flatten(0, -2) if block.layer.kind == "embedding" else outputs.flatten(1)
    return float(rows.double().square().sum(1).mean().sqrt())


def weight_range(model: nn.Module, layer: Layer) -> float:
    """Root mean square over output channels of max − min of a layer's weights.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 3.0], [-2.0, 2.0]]))
        >>> weight_range(net, Layer("", "linear", (2, 2)))  # √((3² + 4²) / 2)
        3.53...
    """
    weight = layer_weight(model, layer).detach().double()
    axis = 1 if layer.transposed else 0
    rows = weight.movedim(axis, 0).flatten(1)
    return float((rows.amax(1) - rows.amin(1)).square().mean().sqrt())
