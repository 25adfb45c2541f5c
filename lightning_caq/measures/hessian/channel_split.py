"""Channel split: which output channels of a layer get their bits together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_caq.measures.hessian.diagonal import layer_diagonals
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.layers import Layer

MOST_GROUPS, LEAST_CHANNELS = 16, 4

Channels = tuple[int, ...]


def group_channels(sensitivity: Tensor) -> tuple[Channels, ...]:
    """Channels of like sensitivity, in groups of equal size: up to 16 groups of 4 channels or more.

    Args:
        sensitivity: What rounding costs each channel, shape (channels,).

    Returns:
        The channels of each group, ascending; the least sensitive group first.

    Example:
        >>> group_channels(torch.tensor([5.0, 0.0, 6.0, 1.0, 7.0, 2.0, 8.0, 3.0]))
        ((1, 3, 5, 7), (0, 2, 4, 6))
    """
    count = min(MOST_GROUPS, max(len(sensitivity) // LEAST_CHANNELS, 1))
    order = sensitivity.argsort(stable=True)
    return tuple(tuple(sorted(part.tolist())) for part in order.tensor_split(count))


def channel_split(measurement: Measurement) -> dict[str, tuple[Channels, ...]]:
    """The groups of each of this process's layers, by its name; nothing where groups were not asked for.

    Channels are sorted by Σ_j D_jj Δ_j² at the smallest bit-width, D the diagonal of the objective's curvature.
    """
    if "channel_groups" not in measurement.needs:
        return {}
    diagonals, errors = measurement.once(layer_diagonals), measurement.once(layer_errors)
    smallest = min(measurement.bits)
    return {
        layer.name: group_channels(channel_sums(layer, diagonals[layer.name] * errors[layer.name][smallest].square()))
        for layer in measurement.rank_layers
    }


def owners(groups: Sequence[Channels]) -> Tensor:
    """The group of each channel, by its index.

    Example:
        >>> owners([(0, 3), (1, 2)])
        tensor([0, 1, 1, 0])
    """
    result = torch.empty(sum(map(len, groups)), dtype=torch.long)
    for i, channels in enumerate(groups):
        result[list(channels)] = i
    return result


def row_owners(layer: Layer, groups: Sequence[Channels]) -> Tensor:
    """The group of each row of the layer's matrices, shape (groups, outputs): see ``to_matrix``."""
    outputs = layer.shape[1] if layer.transposed else layer.shape[0] // layer.groups
    return owners(groups).reshape(-1, outputs).expand(layer.groups, outputs)


def masks(layer: Layer, groups: Sequence[Channels]) -> list[Tensor]:
    """For each group ones at its channels and zeros at the others, in the layer's ``channel_shape``."""
    owner = owners(groups).reshape(layer.channel_shape)
    return [(owner == i).float() for i in range(len(groups))]


def channel_sums(layer: Layer, values: Tensor) -> Tensor:
    """Sums over the weights of each output channel, shape (channels,), float64, on the CPU.

    Example:
        >>> channel_sums(Layer("fc", "linear", (2, 2)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([3., 7.], dtype=torch.float64)
    """
    return values.movedim(1 if layer.transposed else 0, 0).flatten(1).double().sum(1).cpu()


def group_sums(channels: Tensor, owner: Tensor) -> Tensor:
    """Sums over the channels of each group, shape (groups,).

    Args:
        channels: A number a channel, shape (channels,).
        owner: The group of each channel, see ``owners``.

    Example:
        >>> group_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0]))
        tensor([5., 2.])
    """
    return channels.new_zeros(int(owner.max()) + 1).index_add(0, owner, channels)
