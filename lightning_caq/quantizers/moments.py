"""Moments: what a layer's inputs say about the error of its outputs, in the float network and in the rounded one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.batches import batch_size
from lightning_caq.layers import Layer, layer_modules
from lightning_caq.matrix import column_chunks
from lightning_caq.seeding import generator
from lightning_caq.visits import visit_modules

_DAMPING = 0.01
# Neighbouring positions of an image say nearly the same: so many columns, drawn evenly, serve for all of them.
_COLUMNS = 65_536


@dataclass(frozen=True)
class InputMoments:
    """Second moments of the columns a layer multiplies, means over samples and positions.

    Attributes:
        curvature: E[z zᵀ] of the columns z that reach the layer in the network as it is, shape (groups, columns,
            columns), float32. It is the Gauss–Newton block of the squared output error, up to the output's own
            curvature.
        drift: E[(z_f − z) zᵀ], where z_f are the columns in the float network; same shape. Zero if nothing was rounded
            before the layer.
    """

    curvature: Tensor
    drift: Tensor


def input_moments(
    model: nn.Module, layer: Layer, batches: Sequence[Any], floats: Mapping[str, Tensor]
) -> InputMoments | None:
    """Moments of what reaches a layer.

    Args:
        model: The network, in eval mode, rounded as far as it is.
        layer: The layer.
        batches: Calibration batches.
        floats: What differs from the network in the float one, by state-dict key.

    Returns:
        The moments; ``None`` for an embedding, whose curvature is diagonal, and for a layer that no batch reaches.

    Example:
        >>> net, z = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> input_moments(net, layer, [z], {}).curvature
        tensor([[[5., 1.],
                 [1., 2.]]])
    """
    if layer.kind == "embedding" or not layer.calls:
        return None
    samples = sum(map(batch_size, batches))
    draws = generator(0, layer.name)
    curvature, drift, count = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        now = _calls(model, layer, batch)
        with holding(model, floats):
            before = _calls(model, layer, batch)
        if [x.shape for _, x in before] != [x.shape for _, x in now]:
            before = now  # a network that routes its samples by their values: they cannot be told apart
        for (module, inputs), (_, float_inputs) in zip(now, before, strict=True):
            pairs = zip(column_chunks(layer, module, inputs), column_chunks(layer, module, float_inputs), strict=True)
            for z, z_float in pairs:
                positions = z.shape[-1]
                # A convolution has many positions a sample; of a linear layer's vectors none is left out.
                chosen = torch.randperm(positions, generator=draws)[: max(_COLUMNS // samples, 1)].to(z.device)
                q, f = (_flat(x, chosen) for x in (z, z_float))
                curvature = curvature + q @ q.transpose(1, 2)
                drift = drift + (f - q) @ q.transpose(1, 2)
                count += q.shape[-1]
    return InputMoments(curvature / count, drift / count)


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a network hold other values for a while; nothing is copied.

    Args:
        model: The network.
        values: State-dict keys to the tensors to hold.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> with holding(net, {"weight": torch.tensor([[3.0]])}), torch.no_grad():
        ...     print(float(net(torch.ones(1, 1))))
        3.0
    """
    live = model.state_dict(keep_vars=True)
    own = {name: live[name].data for name in values}
    try:
        for name, value in values.items():
            live[name].data = value
        yield
    finally:
        for name, value in own.items():
            live[name].data = value


def damped(curvature: Tensor) -> Tensor:
    """A curvature that can be inverted, float64: a hundredth of the mean diagonal entry is added to the diagonal.

    Args:
        curvature: Shape (…, columns, columns).

    Example:
        >>> damped(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).diagonal()
        tensor([2.0100, 0.0100], dtype=torch.float64)
    """
    h = curvature.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return h + torch.eye(h.shape[-1], dtype=h.dtype, device=h.device) * torch.where(mean > 0, _DAMPING * mean, 1.0)


def _calls(model: nn.Module, layer: Layer, batch: Any) -> list[tuple[nn.Module, Tensor]]:
    """Module and input of every call of a layer."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        seen.append((module, inputs))

    visit_modules(model, layer_modules(model, layer), [batch], visit, calls=layer.calls)
    return seen


def _flat(columns: Tensor, chosen: Tensor) -> Tensor:
    """Some positions of all samples, shape (groups, columns, samples · positions), float32."""
    return columns[..., chosen].float().movedim(0, 2).flatten(2)
