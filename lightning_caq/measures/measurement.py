"""One measurement: the network, the samples and the settings that every measure is taken with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn

from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.quantizers.grids.values import AFFINE, Quantizer
from lightning_caq.utilities.sharing import ALONE, Sharing

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """What measures are taken of, and with.

    Attributes:
        model: The float network, in eval mode, its layers' weights requiring gradients.
        layers: All layers.
        objective: The objective on the samples.
        needs: Names of the measures that are taken, with those that they need.
        bits: Bit-widths whose rounding errors are wanted.
        eigenpairs: Eigenpairs that span the short-axis subspace.
        seed: Seed of the random probes.
        quantizer: The values that weights would be rounded to.
        sharing: Who divides the work.
    """

    model: nn.Module
    layers: Sequence[Layer]
    objective: Objective
    needs: frozenset[str] = frozenset()
    bits: Sequence[int] = ()
    eigenpairs: int = 64
    seed: int = 0
    quantizer: Quantizer = AFFINE
    sharing: Sharing = ALONE
    _results: dict[Callable[[Any], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rank_layers(self) -> list[Layer]:
        """The layers whose rows this process fills; none where there are more processes than layers."""
        return self.sharing.mine(self.layers)

    @property
    def batches(self) -> Sequence[Any]:
        """The samples."""
        return self.objective.batches

    def once(self, compute: Callable[[Measurement], T]) -> T:
        """What a function makes of this measurement, computed at the first call: several measures may share it.

        Example:
            >>> from lightning_caq.network.objective import make_objective
            >>> net = nn.Linear(2, 1)
            >>> measurement = Measurement(net, [], make_objective("distill", net, []))
            >>> first = measurement.once(lambda m: len(m.layers))
            >>> first
            0
        """
        if compute not in self._results:
            self._results[compute] = compute(self)
        return cast("T", self._results[compute])
