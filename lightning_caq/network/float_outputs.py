"""Reference: the float network's outputs on samples that nothing is fitted to, by which other networks are judged.

The calibration objective is a poor judge on few samples. Calibration images are often those of training, of which the
network is sure: their divergence is next to nothing but for a handful near a boundary, and it is these that decide. The
distance of the outputs counts every sample alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.batches import batch_size, run_model


@dataclass(frozen=True)
class Reference:
    """What the float network gives for some samples.

    Attributes:
        batches: The samples.
        outputs: Its outputs, one tensor a batch.
    """

    batches: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    @property
    def size(self) -> float:
        """Root mean square over samples of ‖F(x)‖."""
        return self._rms(self.outputs)

    def distance(self, model: nn.Module) -> float:
        """Root mean square over samples of ‖F_q(x) − F(x)‖, F_q being a network as it is now."""
        with torch.no_grad():
            return self._rms([run_model(model, x) - y for x, y in zip(self.batches, self.outputs, strict=True)])

    def error(self, model: nn.Module) -> float:
        """The output error of a network, its distance over the size of the outputs: a part of the output.

        Example:
            >>> doubled = nn.Linear(1, 1, bias=False)
            >>> _ = doubled.weight.data.fill_(2.0)
            >>> Reference((torch.tensor([[3.0]]),), (torch.tensor([[3.0]]),)).error(doubled)
            1.0
        """
        return self.distance(model) / (self.size or 1.0)

    def _rms(self, outputs: Sequence[Tensor]) -> float:
        squares = sum(float(x.double().square().sum()) for x in outputs)
        return math.sqrt(squares / sum(map(batch_size, self.batches)))


def make_reference(model: nn.Module, batches: Sequence[Any]) -> Reference:
    """The reference that a float network is.

    Args:
        model: The float network, in eval mode.
        batches: The samples.

    Example:
        >>> net = nn.Linear(3, 4)
        >>> make_reference(net, [torch.randn(5, 3)]).error(net)
        0.0
    """
    with torch.no_grad():
        return Reference(tuple(batches), tuple(run_model(model, batch) for batch in batches))
