"""Channel groups: output channels of a layer that get their bits together, and what their rounding errors cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_caq.network.layers import Layer
from lightning_caq.profile import ChannelGroup, LayerCurvature

MOST_GROUPS, LEAST_CHANNELS = 16, 4

Channels = tuple[int, ...]
Figures = dict[str, Any]


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


def start_groups(layer: Layer, diagonal: Tensor, deltas: Mapping[int, Tensor]) -> dict[Channels, Figures]:
    """The groups of a layer with what is known before the Hessian is: sizes, ‖Δ‖², Σ_j D_jj Δ_j² and their share of D.

    Channels are sorted by Σ_j D_jj Δ_j² at the smallest bit-width.

    Args:
        layer: The layer.
        diagonal: D, the diagonal of the Gauss–Newton (``distill``) or the empirical Fisher matrix (``task``), in the
            shape of the weight.
        deltas: Bits to Δ, in the same shape.

    Returns:
        Channels to figures; nothing for a layer of one group, whose figures are the layer's own.

    Example:
        >>> w = torch.ones(8, 2)
        >>> groups = start_groups(Layer("fc", "linear", (8, 2)), w, {2: w * torch.arange(8)[:, None]})
        >>> [(channels, figures["rounding_error"]) for channels, figures in groups.items()]
        [((0, 1, 2, 3), {2: 28.0}), ((4, 5, 6, 7), {2: 252.0})]
    """
    energies = {b: channel_sums(layer, diagonal * delta.square()) for b, delta in deltas.items()}
    groups = group_channels(energies[min(energies)])
    if len(groups) == 1:
        return {}
    owner = owners(groups)
    errors = {b: _sums(channel_sums(layer, delta.square()), owner) for b, delta in deltas.items()}
    energies = {b: _sums(each, owner) for b, each in energies.items()}
    curvature = _sums(channel_sums(layer, diagonal), owner)
    whole = float(curvature.sum())
    found: dict[Channels, Figures] = {}
    for i, channels in enumerate(groups):
        found[channels] = {
            "name": f"{layer.name}/{i}",
            "weights": layer.weights // layer.channels * len(channels),
            "channels": len(channels),
            "macs": -(-layer.macs * len(channels) // layer.channels),
            "rounding_error": {b: float(each[i]) for b, each in errors.items()},
            "diagonal_energy": {b: float(each[i]) for b, each in energies.items()},
            "share": float(curvature[i]) / whole if whole > 0 else len(channels) / layer.channels,
        }
    return found


def finish_groups(layer: Layer, row: Figures) -> tuple[ChannelGroup, ...]:
    """The groups of a layer, with what was measured of the layer shared out among them.

    Args:
        layer: The layer.
        row: Its figures; ``"groups"`` among them, which are used up.

    Returns:
        The groups; of a layer of one group that group, with the layer's own figures.
    """
    groups: dict[Channels, Figures] = row.pop("groups")
    if not groups:
        return (ChannelGroup(tuple(range(layer.channels)), LayerCurvature(name=layer.name, **row)),)
    found = []
    for channels, figures in groups.items():
        share = figures.pop("share")
        figures |= {name: share * row[name] for name in ("trace", "subspace_curvature")}
        found.append(ChannelGroup(channels, LayerCurvature(**figures)))
    return tuple(found)


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


def _sums(channels: Tensor, owner: Tensor) -> Tensor:
    """Sums over the channels of each group."""
    return channels.new_zeros(int(owner.max()) + 1).index_add(0, owner, channels)
