"""Moments: what a layer's inputs say about the error of its outputs, in the float network and in the rounded one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.layer_matrix import columns, count_positions, to_matrix
from lightning_caq.network.layers import Layer, layer_module
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.utilities.seeding import generator

_DAMPING = 0.01
_LEAST_MEAN = 1e-35  # squares below are lost in float32, and with them which inputs are large
# Neighbouring positions of an image say nearly the same: so many columns, drawn evenly, serve for all of them.
_COLUMNS = 65_536
_CHUNK_NUMBERS = 1_000_000  # numbers in one block of columns, 4 MB: larger ones are slower


@dataclass(frozen=True)
class InputMoments:
    """Second moments of the columns a layer multiplies, means over samples and positions.

    Attributes:
        curvature: E[z zᵀ] of the columns z that reach the layer in the network as it is, shape (groups, columns,
            columns), float32. It is the Gauss–Newton block of the squared output error, up to the output's own
            curvature.
        pull: W E[(z_f − z) zᵀ] = E[(W z_f − W z) zᵀ], where z_f are the columns in the float network and W is the float
            weight, shape (groups, outputs, columns). Zero if nothing was rounded before the layer.
    """

    curvature: Tensor
    pull: Tensor


def input_moments(layer: Layer, weight: Tensor, passes: PairedPasses) -> InputMoments | None:
    """Moments of what reaches a layer.

    W (z_f − z) has a row an output where z_f − z has one a column: with o outputs and c columns a position costs
    c² + 2 o c multiplications, where the moment of z_f − z itself would take 2 c². With more outputs than columns the
    latter is taken, and multiplied by W once.

    Args:
        layer: The layer.
        weight: Its float weight.
        passes: The calibration batches in the network as it is, rounded as far as it is, and in the float one.

    Returns:
        The moments; ``None`` for an embedding, whose curvature is diagonal, and for a layer that no batch reaches.

    Example:
        >>> net, z = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> with PairedPasses(net, [layer], [z], {}) as passes:
        ...     input_moments(layer, net.weight.detach(), passes).curvature
        tensor([[[5., 1.],
                 [1., 2.]]])
    """
    if layer.kind == "embedding" or not layer.calls:
        return None
    draws = generator(0, layer.name)
    matrix = to_matrix(layer, weight.float())
    groups, outputs, width = matrix.shape
    few_outputs = 2 * outputs <= width
    # A convolution has many positions a sample; of a linear layer's vectors none is left out.
    wanted = max(_COLUMNS // passes.samples, 1)
    curvature, count = matrix.new_zeros(groups, width, width), 0
    pull = matrix.new_zeros(groups, outputs if few_outputs else width, width)
    for now, before in passes.calls(layer):
        if [call.inputs.shape for call in before] != [call.inputs.shape for call in now]:
            before = now  # a network that routes its samples by their values: they cannot be told apart
        for call, float_call in zip(now, before, strict=True):
            inputs_now, inputs_before = call.shown(call.inputs), float_call.shown(float_call.inputs)
            positions = count_positions(layer, call.module, inputs_now)
            size = groups * width * min(positions, wanted)
            splits = (x.split(max(1, _CHUNK_NUMBERS // size)) for x in (inputs_now, inputs_before))
            for inputs, float_inputs in zip(*splits, strict=True):
                # Other positions of each sample: an image's border and middle then count alike.
                chosen = torch.rand(len(inputs), positions, generator=draws).argsort(1)[:, :wanted].to(inputs.device)
                z = _flat(columns(layer, call.module, inputs, chosen))
                curvature.baddbmm_(z, z.transpose(1, 2))
                count += z.shape[-1]
                if not torch.equal(inputs, float_inputs):
                    moved = _flat(columns(layer, call.module, float_inputs - inputs, chosen))
                    pull.baddbmm_(matrix @ moved if few_outputs else moved, z.transpose(1, 2))
    if not count:  # only samples held out reach it, as they reach an expert
        return None
    pull = pull if few_outputs else matrix @ pull
    return InputMoments(curvature / count, pull / count)


def most_columns(samples: int) -> int:
    """Most columns of all samples together that are looked at.

    Example:
        >>> most_columns(448), most_columns(100_000)
        (65408, 100000)
    """
    return samples * max(_COLUMNS // samples, 1)


def samples_needed(model: nn.Module, layers: Sequence[Layer], samples: int) -> dict[str, int]:
    """The layers whose input curvature cannot have full rank, as it has more rows than columns are seen.

    Args:
        model: The network, for the strides of transposed convolutions.
        layers: The layers, counted on a batch.
        samples: How many samples there are.

    Returns:
        Layer name to the number of samples that show as many columns as the curvature has rows.

    Example:
        >>> layers = [Layer("", "linear", (8, 100), macs=8 * 100, calls=1, modules=("",))]
        >>> samples_needed(torch.nn.Linear(100, 8), layers, 64)
        {'': 100}
    """
    lacking = {}
    for layer in layers:
        if layer.kind == "embedding" or not layer.macs:
            continue
        module: Any = layer_module(model, layer)
        positions = layer.macs / layer.weights  # columns a sample
        if layer.transposed:  # operations count the pixels that go in, columns those that come out, but for the borders
            positions *= math.prod(module.stride)
        needed = math.ceil(to_matrix(layer, torch.empty(layer.shape, device="meta")).shape[-1] / positions)
        if needed > samples:
            lacking[layer.name] = needed
    return lacking


def damped(curvature: Tensor, share: float = _DAMPING) -> Tensor:
    """A curvature that can be inverted, float64: a share of the mean diagonal entry is added to the diagonal.

    Args:
        curvature: Shape (…, columns, columns).
        share: That share.

    Example:
        >>> damped(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).diagonal()
        tensor([2.0100, 0.0100], dtype=torch.float64)
    """
    h = curvature.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return h + torch.eye(h.shape[-1], dtype=h.dtype, device=h.device) * torch.where(
        mean > _LEAST_MEAN, share * mean, 1.0
    )


def _flat(columns: Tensor) -> Tensor:
    """Columns of all samples beside each other, shape (groups, columns, samples · positions), float32."""
    return columns.float().movedim(0, 2).flatten(2)
