"""DoReFa: evenly spaced values for weights squeezed by a hyperbolic tangent (Zhou et al. 2016, §2.3)."""

from __future__ import annotations

from torch import Tensor

from lightning_caq.quantizers.grids.basis import fit_basis
from lightning_caq.quantizers.grids.levels import levels


def dorefa_basis(rows: Tensor, bits: int) -> Tensor:
    """The scale of the values 2 c / (2^b − 1) − 1, from the codes c that the paper's transform gives.

    The transform is c = round((2^b − 1) (tanh w / (2 max |tanh w|) + 1/2)). In the paper the values go from −1 to 1 and
    training makes up for that; here a scale by least squares makes them usable without training. Weights then take
    the nearest value, as with every other quantizer, which lowers the error further.

    Args:
        rows: Weights, float64, shape (1, weights).
        bits: Bit-width b, 1 to 8.

    Returns:
        The scale, float64, shape (1, 1).

    Example:
        >>> import torch
        >>> dorefa_basis(torch.tensor([[-0.1, 0.1]], dtype=torch.float64), 1)
        tensor([[0.1000]], dtype=torch.float64)
    """
    squeezed = rows.tanh()
    largest = squeezed.abs().amax(1, keepdim=True).clamp_min(1e-30)
    codes = ((2**bits - 1) * (squeezed / (2 * largest) + 0.5)).round().long()
    return fit_basis(rows, codes, levels("dorefa", bits).to(rows))
