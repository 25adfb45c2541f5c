"""Groups: scales for runs of weights along the input of a layer, in the place of one scale an output channel.

The columns of ``to_matrix`` are cut into runs of ``group_size``, the last one shorter where they do not divide: inputs
of a linear layer, the numbers of an embedding's row, the places under the kernel of a convolution. A transposed
convolution, whose columns are no runs of its weight, keeps one scale a channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_caq.errors import OptionError
from lightning_caq.network.layers import Layer, layer_weight

GROUP_SIZES = (32, 64, 128)


def layer_group_size(layer: Layer, group_size: int | None) -> int | None:
    """Weights that share a scale in a layer; ``None`` where a whole channel does.

    Example:
        >>> layer_group_size(Layer("fc", "linear", (10, 100)), 64)
        64
        >>> layer_group_size(Layer("up", "conv_transpose2d", (10, 100, 2, 2)), 64)
    """
    return None if layer.transposed else group_size


def group_counts(layers: Sequence[Layer], group_size: int | None) -> tuple[int, ...]:
    """Groups of a channel of each layer, 0 where a whole channel shares a scale; empty without a group size.

    Example:
        >>> group_counts([Layer("fc", "linear", (10, 100))], 64)
        (2,)
    """
    if group_size is None:
        return ()
    sizes = [layer_group_size(layer, group_size) for layer in layers]
    pairs = zip(layers, sizes, strict=True)
    return tuple(0 if size is None else count_groups(x.weights // x.channels, size) for x, size in pairs)


def count_groups(columns: int, group_size: int) -> int:
    """Groups of a channel.

    Example:
        >>> count_groups(128, 64), count_groups(129, 64)
        (2, 3)
    """
    return -(-columns // group_size)


def spread(numbers: Tensor, group_size: int, shape: Sequence[int]) -> Tensor:
    """One number a group as one a weight.

    Args:
        numbers: Shape (*channel shape, groups).
        group_size: Weights of a group; the last group of a channel may have fewer.
        shape: Shape of the weight.

    Returns:
        The numbers in the shape of the weight.

    Example:
        >>> spread(torch.tensor([[[1.0, 2.0]]]), 2, (1, 3))
        tensor([[1., 1., 2.]])
    """
    rows = numbers.flatten(0, -2)
    columns = torch.Size(shape).numel() // len(rows)
    per_weight = rows.repeat_interleave(group_size, 1)[:, :columns]
    axis = next((d for d, size in enumerate(numbers.shape[:-1]) if size > 1), 0)
    others = [size for d, size in enumerate(shape) if d != axis]
    return per_weight.reshape(shape) if len(rows) == 1 else per_weight.reshape(-1, *others).movedim(0, axis)


def check_scale_type(model: nn.Module, layers: Sequence[Layer], scale_dtype: str, most_bits: int) -> None:
    """Refuse a type in which the scales of a layer would be too large, or so small that they lose digits.

    Args:
        model: The float network.
        layers: Its layers.
        scale_dtype: Name of the type.
        most_bits: The largest bit-width.

    Raises:
        OptionError: If a channel, or the weights of a layer as a whole, are out of the range of the type.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> check_scale_type(net, [Layer("", "linear", (2, 2))], "float16", 8)
    """
    info = torch.finfo(getattr(torch, scale_dtype))
    # Numbers below the normal range lose digits; to an eighth of it float16 is no coarser than bfloat16.
    least = info.tiny / 8
    for layer in layers:
        weight = layer_weight(model, layer).detach()
        largest = float(weight.abs().max())
        if 0 < largest < least * 2**most_bits or largest > info.max:
            raise OptionError(
                f"scale_dtype={scale_dtype!r} cannot hold the scales of '{layer.name}', whose weights go up to "
                f"{largest:.2g}; leave that layer out, or give "
                f"{' or '.join(repr(x) for x in ('bfloat16', 'float32') if x != scale_dtype)}."
            )
