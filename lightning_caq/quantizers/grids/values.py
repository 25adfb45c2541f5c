"""Values: which values the weights of a layer may take, by the quantizer that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.grids.abc_net import abc_net_basis
from lightning_caq.quantizers.grids.affine import Grid, channel_rows, fit_grid
from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.grids.deep_compression import kmeans_basis
from lightning_caq.quantizers.grids.dorefa import dorefa_basis
from lightning_caq.quantizers.grids.groups import layer_group_size
from lightning_caq.quantizers.grids.levels import levels
from lightning_caq.quantizers.grids.lq_nets import lq_nets_basis
from lightning_caq.quantizers.grids.series import series_basis
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.sizes import CODEBOOKS, PER_LAYER, Width

QUANTIZERS = ("affine", *CODEBOOKS)
STORED = ("scale", "zero_point", "channel_bits", "basis", "step")
Values = Grid | Codebook | SteppedGrid
_FITS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "codebook": kmeans_basis,
    "lq_nets": lq_nets_basis,
    "abc_net": abc_net_basis,
    "series": series_basis,
    "dorefa": dorefa_basis,
}


@dataclass(frozen=True)
class Quantizer:
    """How the values are chosen that weights are rounded to.

    Attributes:
        name: A name of ``QUANTIZERS``.
        range: Of an affine grid, see ``affine.fit_grid``.
        symmetry: Of an affine grid, see ``affine.fit_grid``.
        keep_zeros: Whether exact zeros of a weight stay zero when it is rounded, see ``zeros.kept_zeros``.
        group_size: Weights of a channel that share a scale of an affine grid; ``None`` where all do.
        scale_dtype: Name of the type that scales of an affine grid are stored in.
    """

    name: str = "affine"
    range: str = "mse"
    symmetry: str = "asymmetric"
    keep_zeros: bool | None = False
    group_size: int | None = None
    scale_dtype: str = "float32"

    def of_layer(self, layer: Layer) -> Quantizer:
        """The same for a certain layer, in which groups may not be had."""
        return replace(self, group_size=layer_group_size(layer, self.group_size))

    def fit(
        self, weight: Tensor, bits: Width, channel_shape: tuple[int, ...], importance: Tensor | None = None
    ) -> Grid | Codebook:
        """The values for a weight.

        Args:
            weight: The weight, any floating-point type.
            bits: Bit-width b, 1 to 8; an affine grid may have one a channel.
            channel_shape: Shape of one scale per channel, broadcastable to the weight.
            importance: How much the squared error of each weight counts, for the range ``"curvature"``.

        Example:
            >>> import torch
            >>> w = torch.tensor([[0.0, 1.0, 2.0, 10.0]])
            >>> Quantizer("codebook").fit(w, 1, (1, 1)).nearest(w)
            tensor([[ 1.,  1.,  1., 10.]])
        """
        if self.name == "affine":
            return fit_grid(
                weight,
                bits,
                channel_shape,
                range=self.range,
                symmetry=self.symmetry,
                importance=importance,
                group_size=self.group_size,
                scale_dtype=getattr(torch, self.scale_dtype),
            )
        assert isinstance(bits, int)
        return fit_codebook(weight, bits, channel_shape, self.name)


AFFINE = Quantizer()


def numbers(values: Values) -> dict[str, Tensor]:
    """The tensors that values are stored as, by name.

    Example:
        >>> import torch
        >>> list(numbers(Grid(2, torch.ones(1, 1), torch.zeros(1, 1))))
        ['scale', 'zero_point']
    """
    if isinstance(values, SteppedGrid):
        return {"step": values.step}
    if isinstance(values, Codebook):
        return {"basis": values.basis}
    widths = {} if values.channel_bits is None else {"channel_bits": values.channel_bits}
    return {"scale": values.scale, "zero_point": values.zero_point, **widths}


def from_numbers(
    quantizer: str,
    bits: int,
    stored: Mapping[str, Tensor],
    *,
    transposed: int = 0,
    group_size: int | None = None,
) -> Values:
    """The values that ``numbers`` was given.

    Args:
        quantizer: Name of the quantizer.
        bits: Bit-width.
        stored: What ``numbers`` gave.
        transposed: Of a stepped grid, see there.
        group_size: Of an affine grid, see there.

    Raises:
        KeyError: If a tensor is missing.
        TypeError: If there is no such quantizer, or the basis has another number of columns than it needs.
    """
    if quantizer == SteppedGrid.quantizer:
        return SteppedGrid(stored["step"], bits, transposed)
    if quantizer == "affine":
        return Grid(bits, stored["scale"], stored["zero_point"], stored.get("channel_bits"), group_size)
    basis = stored["basis"]
    if quantizer not in CODEBOOKS or basis.shape[-1] != len(levels(quantizer, bits)):
        raise TypeError(f"a basis {list(basis.shape)} is none of {quantizer!r} at {bits} bits")
    return Codebook.of(quantizer, bits, basis)


def fit_codebook(weight: Tensor, bits: int, channel_shape: tuple[int, ...], quantizer: str) -> Codebook:
    """The codebook of a weight.

    Args:
        weight: The weight, any floating-point type.
        bits: Bit-width b, 1 to 8.
        channel_shape: Shape of one number per channel, broadcastable to the weight; those quantizers that have one
            table a layer do not use it.
        quantizer: A name of ``levels.CODEBOOKS``.

    Returns:
        The codebook.

    Example:
        >>> import torch
        >>> fit_codebook(torch.tensor([[0.0, 1.0, 8.0, 9.0]]), 1, (1, 1), "codebook").table
        tensor([[[0.5000, 8.5000]]])
    """
    shape = (1,) * weight.ndim if quantizer in PER_LAYER else channel_shape
    basis = _FITS[quantizer](channel_rows(weight, shape), bits)
    return Codebook.of(quantizer, bits, basis.reshape(*shape, -1))
