"""Folding: batch-norm merged into the layer before it, while curvature is measured.

In eval mode a batch-norm is an affine map of the channels: layer and batch-norm together are one layer with the weight
γ/σ · W. The function of W stays the same, and with it every derivative by W; graphs get smaller and products
cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import Layer, layer_module


@contextmanager
def batchnorm_folded(model: nn.Module, layers: Sequence[Layer], batch: Any) -> Iterator[None]:
    """Fold each batch-norm into the layer whose output it takes, for a while.

    Layers that run more than once, share their weight, or whose batch-norm normalises by the batch are left alone. If
    the outputs then differ, because something else takes a layer's output too, nothing is folded.

    Args:
        model: The network, in eval mode.
        layers: The layers; ``Layer.batchnorm`` names what follows each.
        batch: A batch to compare the outputs on.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> x = torch.randn(4, 2)
        >>> before = net(x)
        >>> with batchnorm_folded(net, [Layer("0", "linear", (3, 2), calls=1, batchnorm="1", modules=("0",))], x):
        ...     bool(torch.allclose(net(x), before, atol=1e-6))
        True
    """
    pairs = list(_foldable(model, layers))
    before = _output(model, batch) if pairs else None
    try:
        for layer, module, batchnorm in pairs:
            vars(module)["forward"] = _folded(layer, module, batchnorm)
            vars(batchnorm)["forward"] = _identity
        if before is not None and not torch.allclose(_output(model, batch), before, rtol=1e-3, atol=1e-4):
            _unfold(pairs)
        yield
    finally:
        _unfold(pairs)


Pair = tuple[Layer, nn.Module, nn.Module]


def _foldable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[Pair]:
    for layer in layers:
        # Groups of a transposed convolution share the scales of their output channels; batch-norm has one for each.
        if (
            layer.batchnorm is None
            or layer.calls != 1
            or len(layer.modules) != 1
            or (layer.transposed and layer.groups > 1)
        ):
            continue
        module, batchnorm = layer_module(model, layer), model.get_submodule(layer.batchnorm)
        usual = isinstance(batchnorm, _BatchNorm) and batchnorm.running_var is not None and not batchnorm.training
        if usual and "forward" not in vars(module) and "forward" not in vars(batchnorm):
            yield layer, module, batchnorm


def _unfold(pairs: Sequence[Pair]) -> None:
    for _, *modules in pairs:
        for module in modules:
            vars(module).pop("forward", None)


def _output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return run_model(model, batch).values


def _identity(inputs: Tensor) -> Tensor:
    return inputs


def _folded(layer: Layer, module: nn.Module, batchnorm: Any) -> Any:
    """The layer's forward pass with the batch-norm's scale in its weight and its shift in its bias."""

    def forward(inputs: Tensor) -> Tensor:
        parameters = module._parameters
        weight, bias = parameters["weight"], parameters.get("bias")
        assert weight is not None
        scale = (batchnorm.running_var + batchnorm.eps).rsqrt()
        if batchnorm.weight is not None:
            scale = scale * batchnorm.weight
        shift = -batchnorm.running_mean * scale if bias is None else (bias - batchnorm.running_mean) * scale
        if batchnorm.bias is not None:
            shift = shift + batchnorm.bias
        merged: dict[str, Any] = {**parameters, "weight": weight * scale.reshape(layer.channel_shape), "bias": shift}
        try:
            module._parameters = merged
            output: Tensor = type(module).forward(module, inputs)
        finally:
            module._parameters = parameters
        return output

    return forward
