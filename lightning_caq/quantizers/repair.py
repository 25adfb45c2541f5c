"""Repair: move batch-norm statistics and biases by what quantization changed.

The changes are measured on the same calibration samples in the float and in the quantized network, in order of
execution, each with the repairs before it in place. Statistics are moved, not estimated anew: those of training saw far
more data, and its augmentation (theory: rounding and repair).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, layer_module
from lightning_caq.network.stepped_passes import SteppedPasses


@dataclass
class Moments:
    """Sums over samples and positions of what a module sees, channel by channel, in float64."""

    count: int = 0
    calls: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, values: Tensor, axis: int) -> None:
        """Add a batch of values whose channels lie along ``axis``."""
        x = values.float().movedim(axis, 0).flatten(1)
        var, mean = torch.var_mean(x, dim=1, correction=0)
        self.count += x.shape[1]
        self.calls += 1
        self.total = self.total + x.shape[1] * mean.double()
        self.squares = self.squares + x.shape[1] * (var.double() + mean.double().square())

    @property
    def mean(self) -> Tensor:
        """Mean, shape (channels,)."""
        return torch.as_tensor(self.total) / self.count

    @property
    def var(self) -> Tensor:
        """Variance, shape (channels,)."""
        return (torch.as_tensor(self.squares) / self.count - self.mean.square()).clamp_min(0)


def repairable(model: nn.Module, layers: Sequence[Layer]) -> dict[str, nn.Module]:
    """What can be repaired: batch-norms with running statistics, and layers that have a bias and no batch-norm behind.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> layers = [Layer("0", "linear", (3, 2), calls=1, batchnorm="1"), Layer("2", "linear", (2, 3), calls=1)]
        >>> list(repairable(net, layers))
        ['1', '2']
    """
    modules: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if _is_batchnorm(module)}
    for layer in layers:
        # An embedding's rows have no common bias; a layer that no batch reached has nothing to measure.
        if layer.batchnorm is None and layer.calls and getattr(layer_module(model, layer), "bias", None) is not None:
            modules[layer.name] = layer_module(model, layer)
    return modules


def measure_moments(model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any]) -> dict[str, Moments]:
    """Moments of what enters each batch-norm and of what leaves each layer, in order of execution; one pass.

    Args:
        model: The network, in eval mode.
        modules: The modules by name.
        batches: Calibration batches.

    Returns:
        Name to moments; a module that no batch reaches is missing.
    """
    names = {id(module): name for name, module in modules.items()}
    moments: dict[str, Moments] = {}

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        moments.setdefault(names[id(module)], Moments()).add(*_seen(module, inputs, lambda: output))

    visit_modules(model, modules.values(), batches, visit, padding="dropped")
    return moments


def _seen(module: nn.Module, inputs: Tensor, output: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What moments are taken of, and the axis of its channels: the input of a batch-norm, the output of a layer."""
    return inputs if isinstance(module, _BatchNorm) else output(), -1 if isinstance(module, nn.Linear) else 1


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def move_statistics(
    model: nn.Module, modules: Mapping[str, nn.Module], reference: Mapping[str, Moments], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Move statistics and biases of a quantized network, in place, by what quantization changed.

    Batch-norm: running mean += m_q − m_f, running variance *= v_q / v_f, where m and v are the mean and the variance
    of what enters it. Layer: bias −= mean output error.

    Args:
        model: The quantized network, in eval mode.
        modules: What to repair, from ``repairable``.
        reference: Moments in the float network, from ``measure_moments``, in order of execution.
        batches: The calibration batches that ``reference`` was measured on.

    Returns:
        State-dict key to the repaired tensor.
    """
    changed: dict[str, Tensor] = {}
    with SteppedPasses(model, modules.values(), batches) as passes, torch.no_grad():
        for name, before in reference.items():
            module: Any = modules[name]
            after = Moments()
            for calls in passes.calls([module], before.calls // len(batches)):
                for call in calls:
                    values, axis = _seen(module, call.inputs, call.output)
                    after.add(call.shown(values), axis)
            shift = after.mean - before.mean
            if _is_batchnorm(module):
                ratio = torch.where(before.var > 0, after.var / before.var.clamp_min(1e-30), 1.0)
                module.running_mean.add_(shift.to(module.running_mean.dtype))
                module.running_var.mul_(ratio.to(module.running_var.dtype))
                changed[f"{name}.running_mean"] = module.running_mean.detach().clone()
                changed[f"{name}.running_var"] = module.running_var.detach().clone()
            else:
                module.bias.sub_(shift.to(module.bias.dtype))
                # The network may be a single layer, whose name is empty.
                changed[f"{name}.bias".lstrip(".")] = module.bias.detach().clone()
    return changed


@dataclass(frozen=True)
class Repair:
    """What a repair needs to know of the float network.

    Attributes:
        modules: What can be repaired, by name.
        reference: Moments in the float network.
        fitted: The samples that moments are measured on.
        held_out: The float network's outputs on other samples, by which a repair is judged.
    """

    modules: Mapping[str, nn.Module]
    reference: Mapping[str, Moments]
    fitted: Sequence[Any]
    held_out: Reference

    def __call__(self, model: nn.Module) -> tuple[dict[str, Tensor], str]:
        """Repair a quantized network in place, if that brings its outputs nearer on the samples held out.

        Returns:
            State-dict key to the repaired tensor, and what was seen where it was dropped, empty otherwise.
        """
        before = self.held_out.error(model)
        live = model.state_dict(keep_vars=True)
        kept = {name: tensor.detach().clone() for name, tensor in live.items()}
        changed = move_statistics(model, self.modules, self.reference, self.fitted)
        after = self.held_out.error(model)
        if after <= before:
            return changed, ""
        with torch.no_grad():
            for name in changed:
                live[name].copy_(kept[name])
        return {}, f"output error {before:.2%} without it, {after:.2%} with it"


def prepare_repair(model: nn.Module, layers: Sequence[Layer], fitted: Sequence[Any], held_out: Reference) -> Repair:
    """Measure a float network for later repairs.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        fitted: The calibration batches that moments are measured on.
        held_out: Its outputs on other samples, to judge repairs by.

    Returns:
        The repair, to be called on the quantized network.
    """
    modules = repairable(model, layers)
    return Repair(modules, measure_moments(model, modules, fitted), fitted, held_out)
