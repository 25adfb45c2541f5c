"""Reference: the float network's outputs on some samples, by which other networks are judged.

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

from lightning_caq.network.batches import batch_size
from lightning_caq.network.forward import run_model
from lightning_caq.network.outputs import Outputs


@dataclass(frozen=True)
class Reference:
    """What the float network gives for some samples.

    Attributes:
        batches: The samples.
        outputs: Its outputs on each.
    """

    batches: tuple[Any, ...]
    outputs: tuple[Outputs, ...]

    @property
    def size(self) -> float:
        """Root mean square over samples of ‖F(x)‖."""
        return self._rms([y.values for y in self.outputs])

    def on(self, model: nn.Module, batches: Sequence[Any]) -> Reference:
        """The reference on some of the samples: outputs of whole batches are taken over, batches that were cut are run.

        Args:
            model: The float network, in eval mode.
            batches: Batches out of ``self.batches``, or parts of them.

        Example:
            >>> net, x = nn.Linear(3, 4), torch.randn(5, 3)
            >>> whole = make_reference(net, [x, x + 1])
            >>> part = whole.on(net, [x, x[:2]])
            >>> part.outputs[0] is whole.outputs[0], len(part.outputs[1].values)
            (True, 2)
        """
        known = {id(x): y for x, y in zip(self.batches, self.outputs, strict=True)}
        with torch.no_grad():
            outputs = tuple(known[id(x)] if id(x) in known else run_model(model, x) for x in batches)
        return Reference(tuple(batches), outputs)

    def distances(self, model: nn.Module) -> Tensor:
        """‖F_q(x) − F(x)‖ of each sample, F_q being a network as it is now; shape (samples,), float64.

        Example:
            >>> net, doubled = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            >>> _ = doubled.weight.data.copy_(2 * net.weight.data.fill_(1.0))
            >>> make_reference(net, [torch.tensor([[3.0], [4.0]])]).distances(doubled).tolist()
            [3.0, 4.0]
        """
        with torch.no_grad():
            pairs = zip(self.batches, self.outputs, strict=True)
            changes = [run_model(model, x).values - y.values for x, y in pairs]
        return torch.cat([x.double().flatten(1).norm(dim=1).cpu() for x in changes])

    def distance(self, model: nn.Module) -> float:
        """Root mean square over samples of ‖F_q(x) − F(x)‖, F_q being a network as it is now."""
        return self._rms([self.distances(model)])

    def error(self, model: nn.Module) -> float:
        """The output error of a network, its distance over the size of the outputs: a part of the output.

        Example:
            >>> net = nn.Linear(1, 1, bias=False)
            >>> reference = make_reference(net, [torch.tensor([[3.0]])])
            >>> _ = net.weight.data.mul_(2.0)
            >>> reference.error(net)
            1.0
        """
        return self.relative(self.distances(model))

    def relative(self, distances: Tensor) -> float:
        """The output error that distances of all samples come to."""
        return self._rms([distances]) / (self.size or 1.0)

    def _rms(self, values: Sequence[Tensor]) -> float:
        squares = sum(float(x.double().square().sum()) for x in values)
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
