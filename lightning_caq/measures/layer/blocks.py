"""Blocks: a layer together with the batch-norm and the activation that directly follow it, as one function f_i.

What follows a layer is seen while one batch runs: every call of a known normalisation or activation whose first
argument is the tensor that the block has produced so far is taken into the block. No tracing of the network is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_caq.measures.cost import BLOCK_SAMPLES
from lightning_caq.measures.measurement import Measurement
from lightning_caq.network.batches import take_samples
from lightning_caq.network.forward import run_model
from lightning_caq.network.hooks import watching
from lightning_caq.network.layers import Layer, layer_modules

_MEMORY, _LEAST_SAMPLES = 2**28, 4


def _batchnorm_lipschitz(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Largest |γ| / √(σ² + ε) over channels: batch-norm in eval mode is an affine map.

    Without running statistics it normalises by those of the batch and is none: the block ends before it.
    """
    values = dict(
        zip(
            ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
            args,
            strict=False,
        )
    )
    values.update(kwargs)
    if values.get("training") or values["running_var"] is None:
        return None
    scale = (values["running_var"] + values["eps"]).rsqrt()
    return float((scale if values["weight"] is None else values["weight"].abs() * scale).max())


def _constant(value: float) -> Callable[[tuple[Any, ...], dict[str, Any]], float]:
    return lambda args, kwargs: value


def _leaky_lipschitz(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    return max(1.0, abs(float(slope)))


def _elu_lipschitz(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    alpha = args[1] if len(args) > 1 else kwargs.get("alpha", 1.0)
    return max(1.0, abs(float(alpha)))


# The Lipschitz constant of everything that may follow a layer inside its block; ``None`` where there is none. Layer
# norm is not here: it has no global constant, and a block ends before it.
FOLLOWERS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], float | None]] = {
    F.batch_norm: _batchnorm_lipschitz,
    F.relu: _constant(1.0),
    torch.relu: _constant(1.0),
    Tensor.relu: _constant(1.0),
    F.relu6: _constant(1.0),
    F.hardtanh: _constant(1.0),
    F.leaky_relu: _leaky_lipschitz,
    F.elu: _elu_lipschitz,
    F.gelu: _constant(1.129),
    F.silu: _constant(1.0999),
    F.mish: _constant(1.0885),
    F.hardswish: _constant(1.5),
    F.softplus: _constant(1.0),
    torch.tanh: _constant(1.0),
    Tensor.tanh: _constant(1.0),
    F.tanh: _constant(1.0),
    torch.sigmoid: _constant(0.25),
    Tensor.sigmoid: _constant(0.25),
    F.sigmoid: _constant(0.25),
}

Step = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


@dataclass
class Block:
    """A layer and what directly follows it, f_i.

    Attributes:
        layer: The layer.
        module: Its module.
        inputs: The inputs z_i that reached it with the batch, samples first.
        steps: The functions that follow, with their arguments behind the first.
        after_lipschitz: Product of their Lipschitz constants.
    """

    layer: Layer
    module: nn.Module
    inputs: Tensor
    steps: list[Step] = field(default_factory=list)
    after_lipschitz: float = 1.0

    def __call__(self, inputs: Tensor) -> Tensor:
        """f_i(z)."""
        output: Tensor = self.module(inputs)
        for function, args, kwargs in self.steps:
            output = function(output, *args, **kwargs)
        return output


def record_blocks(model: nn.Module, layers: Sequence[Layer], batch: Any) -> dict[str, Block]:
    """The block of every layer that the batch reaches; of a layer that runs more than once, its first call.

    Args:
        model: The network, in eval mode.
        layers: The layers.
        batch: A batch.

    Returns:
        Layer name to block.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> from lightning_caq.network.layers import find_layers
        >>> x = torch.zeros(5, 3)
        >>> blocks = record_blocks(net, find_layers(net, x), x)
        >>> [(name, [step[0].__name__ for step in block.steps]) for name, block in blocks.items()]
        [('0', ['relu']), ('2', [])]
    """
    recorder = _Recorder()
    watched = {id(module): layer for layer in layers for module in layer_modules(model, layer)}

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        recorder.start(Block(watched[id(module)], module, inputs.detach()), output)

    with watching([m for m in model.modules() if id(m) in watched], hook), torch.no_grad(), recorder:
        run_model(model, batch)
    return recorder.blocks


def measured_blocks(measurement: Measurement) -> dict[str, Block]:
    """The blocks of this process's layers on samples of the first batch; those that it does not reach are missing.

    At most 32 samples, and no more than whose inputs take 256 MiB, but four.
    """
    m = measurement
    alone = record_blocks(m.model, m.rank_layers, take_samples(m.batches[:1], 1)[0])
    size = sum(block.inputs.nbytes for block in alone.values())
    samples = max(min(BLOCK_SAMPLES, _MEMORY // max(size, 1)), _LEAST_SAMPLES)
    return record_blocks(m.model, m.rank_layers, take_samples(m.batches[:1], samples)[0])


class _Recorder(TorchFunctionMode):
    """Watches torch functions and appends those that take a block's output as their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, Block] = {}
        self._ends: dict[int, tuple[Tensor, Block]] = {}  # keeps the tensors, so that no identity is used twice

    def start(self, block: Block, output: Tensor) -> None:
        if block.layer.name not in self.blocks:
            self.blocks[block.layer.name] = block
            self._ends[id(output)] = (output, block)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        end = self._ends.get(id(args[0])) if args else None
        lipschitz = FOLLOWERS.get(func) if end is not None else None
        known = lipschitz(args, kwargs) if lipschitz is not None else None
        version = args[0]._version if end is not None else 0
        output = func(*args, **kwargs)
        if end is not None and known is not None:
            block = self._ends.pop(id(args[0]))[1]
            # Replayed out of place: the block's own tensors must survive for the second derivative.
            block.steps.append((func, args[1:], {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs))
            block.after_lipschitz *= known
            self._ends[id(output)] = (output, block)
        elif end is not None and args[0]._version != version:
            del self._ends[id(args[0])]  # changed in place, as by a residual sum: the block ends before that
        return output
