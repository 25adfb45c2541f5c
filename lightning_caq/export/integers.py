"""Integers: a weight as other runtimes store it, in a standard integer type with whole zero points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

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
        values: Whole numbers in the shape of the weight, int32.
        scale: Float32, one a channel, or a single one without dimensions.
        zero_point: Whole numbers, int32, same shape as ``scale``.
        axis: Dimension of the weight that the channels lie along; 0 where there is a single scale.
        doubled: Whether the values are doubled codes, as zero points at half a step need.
    """

    type: str
    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    doubled: bool


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
    axes = [d for d, size in enumerate(grid.scale.shape) if size > 1]
    if len(axes) > 1:
        raise ExportError(f"Scales of shape {list(grid.scale.shape)} vary along several dimensions; ONNX allows one.")
    doubled = bool((grid.zero_point != grid.zero_point.round()).any())
    factor = 2 if doubled else 1
    zero = (grid.zero_point * factor).to(torch.int32)
    low, high = zero.clamp(max=0), zero.maximum((factor * grid.top).to(torch.int32))
    span = int((high - low).max())
    type_ = next((name for name, largest in TYPES.items() if name in types and span <= largest), None)
    if type_ is None:
        raise ExportError(f"Weights that take {span + 1} integers need uint16, which ONNX has from opset 21 on.")
    values = grid.codes(weight.detach()).to(torch.int32) * factor - low
    shape = grid.scale.numel() if axes else ()
    return Integers(
        type=type_,
        values=values,
        scale=(grid.scale / factor).reshape(shape),
        zero_point=(zero - low).reshape(shape),
        axis=axes[0] if axes else 0,
        doubled=doubled,
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
