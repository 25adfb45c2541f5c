"""Coded weights in a file: the steps of all layers, and one entropy-coded stream of their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_caq.errors import LayerError
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.packing.coded import decode_weights, encode_weights
from lightning_caq.quantizers.packing.entropy import CodingError

STREAM, STEPS = "lightning_caq.codes", "lightning_caq.steps"


@dataclass(frozen=True)
class CodedWeight:
    """A weight whose codes are part of the stream; the counterpart of ``PackedWeight``.

    Attributes:
        grid: The multiples of its step.
        codes: Codes, int32, in the shape of the weight.
    """

    quantizer: ClassVar[str] = SteppedGrid.quantizer
    parts: ClassVar[tuple[str, ...]] = ()  # none of its own
    grid: SteppedGrid
    codes: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: SteppedGrid) -> CodedWeight:
        """A weight, rounded to the nearest values."""
        return cls(grid, grid.codes(weight.detach()).to(torch.int32))

    @property
    def bits(self) -> float:
        """Bits a code."""
        return self.grid.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape)

    def values(self) -> Tensor:
        """The weight, float32."""
        return self.grid.values(self.codes)

    def to(self, device: torch.device) -> CodedWeight:
        """The same on another device."""
        return replace(self, grid=self.grid.to(device), codes=self.codes.to(device))


def coded_tensors(weights: Sequence[CodedWeight]) -> dict[str, Tensor]:
    """The tensors that weights are stored as; none for none.

    Raises:
        LayerError: If a weight is too many steps from zero.

    Example:
        >>> weight = CodedWeight.of(torch.tensor([[0.5, -1.0]]), SteppedGrid(torch.tensor([[0.5]])))
        >>> {name: (x.dtype, len(x)) for name, x in coded_tensors([weight]).items()}
        {'lightning_caq.codes': (torch.uint8, 18), 'lightning_caq.steps': (torch.float32, 1)}
    """
    if not weights:
        return {}
    try:
        stream = encode_weights([x.codes for x in weights], [x.grid.transposed for x in weights])
    except CodingError as error:
        raise LayerError(f"The weights cannot be stored: {error}") from error
    steps = torch.stack([x.grid.step.detach().cpu().flatten()[0] for x in weights])
    return {STREAM: torch.from_numpy(np.frombuffer(stream, dtype=np.uint8).copy()), STEPS: steps}


def coded_weights(
    tensors: dict[str, Tensor], *, shapes: Sequence[tuple[int, ...]], bits: Sequence[float], transposed: Sequence[int]
) -> list[CodedWeight]:
    """Take the weights that ``coded_tensors`` was given out of a file's tensors.

    Args:
        tensors: The tensors of a file.
        shapes: Shapes of the weights.
        bits: Bits a code of each.
        transposed: See ``SteppedGrid``.

    Raises:
        ValueError: If the stream or the steps are not those of such weights.
    """
    stream, steps = tensors.pop(STREAM), tensors.pop(STEPS)
    if (
        steps.shape != (len(shapes),)
        or steps.dtype != torch.float32
        or not bool((steps.isfinite() & (steps > 0)).all())
    ):
        raise ValueError("its steps are not those of its layers")
    if stream.dtype != torch.uint8 or stream.ndim != 1:
        raise ValueError("its codes are no stream of bytes")
    codes = decode_weights(stream.numpy().tobytes(), shapes, transposed)
    grids = [
        SteppedGrid(step.reshape((1,) * len(shape)).clone(), float(b), groups)
        for step, shape, b, groups in zip(steps, shapes, bits, transposed, strict=True)
    ]
    return [CodedWeight(grid, x) for grid, x in zip(grids, codes, strict=True)]
