"""One layer taken through the package's own passes, for tests of moments and of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_caq.network.layers import layer_weight
from lightning_caq.quantizers.rounding.moments import input_moments
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.quantizers.rounding.round_layer import round_layer


def moments(net: nn.Module, layer: Any, batches: Sequence[Any], floats: dict[str, Tensor]) -> Any:
    """Moments of what reaches one layer."""
    with PairedPasses(net, [layer], batches, floats) as passes:
        return input_moments(layer, layer_weight(net, layer).detach(), passes)


def rounded(
    net: nn.Module, layer: Any, bits: Any, rounding: str, batches: Sequence[Any], floats: dict[str, Tensor]
) -> Any:
    """One layer rounded: its grid and its codes."""
    with PairedPasses(net, [layer], batches, floats) as passes:
        return round_layer(net, layer, bits, rounding, passes)
