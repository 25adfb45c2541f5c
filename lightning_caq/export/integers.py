"""Integers: a weight as other runtimes store it, in a standard integer type with whole zero points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_caq.errors import ExportError
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid

TYPES = {"uint4": 15, "uint8": 255, "uint16": 65535}  # ONNX's unsigned types and the largest number of each


@dataclass(frozen=True)
class Integers:
    """The weight scale · (values − zero_point), all of whose products are those of the grid to the last bit.

    Attributes:
        type: The smallest standard type that holds values and zero points, such as ``"uint4"``.
        values: Whole numbers in the shape of the weight, int32; with groups as a matrix, which has as many.
        scale: Float32, one a channel, or a single one without dimensions; with groups as many dimensions as the values.
        zero_point: Whole numbers, int32, same shape as ``scale``.
        axis: Dimension of the values that the channels, or the groups of each, lie along; 0 where there is a single
            scale.
        doubled: Whether the values are doubled codes, as zero points at half a step need.
        group_size: Values along ``axis`` that share a scale; ``None`` without groups.
        shape: Shape of the weight where that of the values is another; else empty.
    """

    type: str
    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    doubled: bool
    group_size: int | None = None
    shape: tuple[int, ...] = ()


def to_integers(weight: Tensor, grid: Grid | SteppedGrid, types: Collection[str] = tuple(TYPES)) -> Integers:
    """A weight on a grid as integers.

    Runtimes want whole zero points inside the range of the type. Where a zero point lies half-way between two codes,
    codes and zero points are doubled and the scale is halved; where one lies outside the codes, codes and zero point of
    that channel are shifted together. Both leave scale · (code − zero point) exactly as it was.

    Args:
        weight: The weight.
        grid: Its grid, with one scale in all or one for each place along one dimension.
        types: The types that may be used.

    Raises:
        ExportError: If scales vary along more than one dimension, or no type is large enough.

    Example:
        >>> grid = Grid(2, torch.tensor([[0.5]]), torch.tensor([[1.5]]))
        >>> x = to_integers(torch.tensor([[-0.75, 0.25]]), grid)
        >>> x.type, x.values, x.zero_point, x.scale
        ('uint4', tensor([[0, 4]], dtype=torch.int32), tensor(3, dtype=torch.int32), tensor(0.2500))
    """
    if isinstance(grid, SteppedGrid):
        return _from_multiples(weight, grid, types)
    if grid.group_size is not None and grid.scale.shape[-1] > 1:
        return _from_groups(weight, grid, types)
    if grid.group_size is not None:  # one group is a channel
        scale, zero_point = grid.scale.squeeze(-1), grid.zero_point.squeeze(-1)
        grid = replace(grid, scale=scale, zero_point=zero_point, group_size=None)
    axes = [d for d, size in enumerate(grid.scale.shape) if size > 1]
    if len(axes) > 1:
        raise ExportError(f"Scales of shape {list(grid.scale.shape)} vary along several dimensions; ONNX allows one.")
    doubled = bool((grid.zero_point != grid.zero_point.round()).any())
    factor = 2 if doubled else 1
    zero = (grid.zero_point * factor).to(torch.int32)
    low, high = zero.clamp(max=0), zero.maximum((factor * grid.top).to(torch.int32))
    type_ = _type(int((high - low).max()), types)
    values = grid.codes(weight.detach()).to(torch.int32) * factor - low
    shape = grid.scale.numel() if axes else ()
    return Integers(
        type=type_,
        values=values,
        scale=(grid.scale.float() / factor).reshape(shape),
        zero_point=(zero - low).reshape(shape),
        axis=axes[0] if axes else 0,
        doubled=doubled,
    )


def _type(span: int, types: Collection[str]) -> str:
    """The smallest type that holds 0 to ``span``."""
    kind = next((name for name, largest in TYPES.items() if name in types and span <= largest), None)
    if kind is None:
        raise ExportError(f"Weights that take {span + 1} integers need uint16, which ONNX has from opset 21 on.")
    return kind


def _from_groups(weight: Tensor, grid: Grid, types: Collection[str]) -> Integers:
    """A weight with a scale a group, as a matrix in which the groups of a channel lie along one dimension.

    A weight of two dimensions is one as it is, others have a row a channel. Zero points lie within the codes.
    """
    if "uint4" not in types:
        raise ExportError(
            "Scales of groups need the block_size of DequantizeLinear, which ONNX has from opset 21 on; export with "
            "opset=21 or later, or quantize with group_size=None."
        )
    doubled = bool((grid.zero_point != grid.zero_point.round()).any())
    factor, matrix = 2 if doubled else 1, weight.ndim == 2
    values, scale, zero_point = grid.codes(weight.detach()), grid.scale.float(), grid.zero_point
    across = matrix and scale.shape[1] > 1  # channels lie along the second dimension
    numbers = [x.flatten(0, -2).T if across else x.flatten(0, -2) for x in (scale / factor, zero_point * factor)]
    return Integers(
        type=_type(int(factor * grid.top), types),
        values=(factor * (values if matrix else values.flatten(1))).to(torch.int32),
        scale=numbers[0].contiguous(),
        zero_point=numbers[1].to(torch.int32).contiguous(),
        axis=0 if across else 1,
        doubled=doubled,
        group_size=grid.group_size,
        shape=() if matrix else tuple(weight.shape),
    )


def _from_multiples(weight: Tensor, grid: SteppedGrid, types: Collection[str]) -> Integers:
    """A weight whose values are multiples of one step; the smallest of them, or zero, becomes number 0."""
    multiples = grid.codes(weight.detach()).to(torch.int64)
    low = int(multiples.amin().clamp(max=0))
    span = int(multiples.amax().clamp(min=0)) - low
    kind = next((name for name, largest in TYPES.items() if name in types and span <= largest), None)
    if kind is None:
        raise ExportError(
            f"An entropy-coded weight spans {span} steps, more than {', '.join(types)} hold; export with a later opset "
            "if uint16 is not among these, or quantize with coding='fixed'."
        )
    values, zero = (multiples - low).to(torch.int32), torch.tensor(-low, dtype=torch.int32, device=weight.device)
    return Integers(type=kind, values=values, scale=grid.step.reshape(()), zero_point=zero, axis=0, doubled=False)
