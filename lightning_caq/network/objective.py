"""The calibration objective: what quantization must not increase.

``distill`` is the divergence from the float network's outputs to the outputs now (``network.outputs``): between
distributions over classes the mean Kullback–Leibler divergence, between values half the mean squared distance. It needs
no labels, its gradient is zero at the float weights and its Hessian there is the generalised Gauss–Newton matrix.
``task`` is the user's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.batches import batch_size
from lightning_caq.network.float_outputs import Reference, make_reference
from lightning_caq.network.forward import Batch, run_model
from lightning_caq.network.outputs import Outputs, divergence, divergences
from lightning_caq.scores import Score

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss over calibration batches, averaged over samples.

    Attributes:
        name: ``"distill"`` or ``"task"``.
        batches: The calibration batches.
        targets: For ``distill``, the float network's outputs, one tensor a batch.
        loss: For ``task``, the user's loss of a model and a batch.
    """

    name: str
    batches: tuple[Any, ...]
    targets: tuple[Outputs, ...] = ()
    loss: Loss | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(batch_size(batch) for batch in self.batches)

    def on(self, model: nn.Module, batches: Sequence[Any]) -> Objective:
        """The objective on some of the samples; the float network is run on batches that were cut, and on no others.

        Args:
            model: The float network, in eval mode.
            batches: Batches out of ``self.batches``, or parts of them.

        Example:
            >>> net, x = nn.Linear(3, 4), torch.randn(5, 3)
            >>> make_objective("distill", net, [x, x]).on(net, [x[:2]]).samples
            2
        """
        if self.name == "task":
            return replace(self, batches=tuple(batches))
        return objective_from(self.name, Reference(self.batches, self.targets).on(model, batches))

    def weight(self, index: int) -> float:
        """Share of batch ``index`` in the mean over samples; uneven batches count by their sizes."""
        return batch_size(self.batches[index]) / self.samples

    def batch_loss(self, model: nn.Module, index: int) -> Tensor:
        """Mean loss over the samples of one batch, in nat, a scalar with its graph.

        Raises:
            CalibrationError: If the loss is not a finite scalar.
        """
        if self.name == "distill":
            return divergence(self.targets[index], run_model(model, self.batches[index]))
        assert self.loss is not None
        batch = self.batches[index]
        loss = self.loss(model, batch.data if isinstance(batch, Batch) else batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CalibrationError(f"The loss of calibration batch {index} must be a scalar tensor, got {_what(loss)}.")
        if not bool(torch.isfinite(loss).all()):
            raise CalibrationError(
                f"The loss of calibration batch {index} is {loss.item()}; only finite losses can be used."
            )
        return loss.reshape(())

    def value(self, model: nn.Module) -> float:
        """The objective of a network: mean loss over all samples, nat."""
        with torch.no_grad():
            return sum(self.weight(i) * float(self.batch_loss(model, i).double()) for i in range(len(self.batches)))

    def score(self, model: nn.Module) -> Score:
        """``value`` with what it rests on: the divergence of each sample, or the user's loss of each batch.

        Example:
            >>> net = nn.Linear(3, 4)
            >>> score = make_objective("distill", net, [torch.randn(16, 3)]).score(net)
            >>> score, score.samples, score.stderr
            (0.0, 16, 0.0)
        """
        if self.name == "task":
            with torch.no_grad():
                losses = [float(self.batch_loss(model, i).double()) for i in range(len(self.batches))]
            return Score.of_means(losses, [batch_size(batch) for batch in self.batches])
        with torch.no_grad():
            pairs = zip(self.targets, self.batches, strict=True)
            parts = [divergences(target, run_model(model, batch)) for target, batch in pairs]
        value = sum(self.weight(i) * float(part.mean().double()) for i, part in enumerate(parts))
        if sum(map(len, parts)) != self.samples:  # outputs that are one for a whole batch
            return Score.of_means([float(x.mean()) for x in parts], [batch_size(batch) for batch in self.batches])
        return Score(value, torch.cat(parts).tolist(), [1.0] * self.samples)


def make_objective(name: str, model: nn.Module, batches: Sequence[Any], loss: Loss | None = None) -> Objective:
    """The objective of a float network over batches.

    Args:
        name: ``"distill"`` or ``"task"``.
        model: The float network, in eval mode.
        batches: Calibration batches.
        loss: Loss of a model and a batch, needed for ``"task"``.

    Raises:
        OptionError: If ``"task"`` has no loss.
        CalibrationError: If an output or a loss is NaN or infinite.

    Example:
        >>> net = nn.Linear(3, 4)
        >>> make_objective("distill", net, [torch.randn(5, 3)]).value(net)
        0.0
    """
    reference = make_reference(model, batches) if name == "distill" else Reference(tuple(batches), ())
    return objective_from(name, reference, loss)


def objective_from(name: str, reference: Reference, loss: Loss | None = None) -> Objective:
    """The objective over batches on which the float network's outputs are known already.

    Args:
        name: ``"distill"`` or ``"task"``.
        reference: The batches and, for ``"distill"``, the float outputs.
        loss: Loss of a model and a batch, needed for ``"task"``.

    Raises:
        OptionError: If ``"task"`` has no loss.
        CalibrationError: If an output is NaN or infinite.
    """
    if name == "distill":
        for index, output in enumerate(reference.outputs):
            if not bool(torch.isfinite(output.values).all()):
                raise CalibrationError(f"The outputs for calibration batch {index} hold NaN or infinite values.")
        return Objective(name, reference.batches, targets=reference.outputs)
    if loss is None:
        raise OptionError("objective='task' needs loss_fn, a function of the model and a batch that returns the loss.")
    return Objective(name, reference.batches, loss=loss)


def _what(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
