"""Carried errors: what the rounding error of every layer, at every bit-width, has become at the network's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.forward import run_model
from lightning_caq.network.hooks import watching
from lightning_caq.network.layer_matrix import along_channels
from lightning_caq.network.layers import Layer, apply_weight, layer_modules
from lightning_caq.network.padding import padding_of, padding_zeroed
from lightning_caq.sizes import W, Width
from lightning_caq.utilities.seeding import generator

_MOST_PROBES = 16
# Beside the errors: a layer's input, the zero, their sum, its gradient, and what the graph keeps of what follows.
_TENSORS_HELD = 8

Calls = dict[str, list[tuple[nn.Module, Tensor, Tensor]]]


@dataclass(frozen=True)
class CarriedErrors:
    """Errors of layers, to first order, where they arise and where they arrive.

    Attributes:
        components: Layer name to bits (one width, or one a channel) to J_i u_i(b), one row a sample, its components
            along the probes: the network's outputs themselves, or random directions that keep squared norms and inner
            products in the mean. Shape (N, probes), float64, on the CPU.
        errors: Layer name to bits to e_i(b), root mean square of ‖u_i(b)‖ over samples.
    """

    components: dict[str, dict[Width, Tensor]]
    errors: dict[str, dict[Width, float]]

    def at_output(self, name: str, bits: Width) -> float:
        """A_i(b) e_i(b), root mean square of ‖J_i u_i(b)‖ over samples."""
        rows = self.components[name][bits]
        return math.sqrt(float(rows.square().sum()) / len(rows))

    def gram(self, bits: Mapping[str, Width]) -> Tensor:
        """G_ij, mean over samples of ⟨J_i u_i, J_j u_j⟩; shape (k, k), in the order of bits."""
        rows = self._rows(bits)
        return rows.flatten(1) @ rows.flatten(1).T / rows.shape[1]

    def bound(self, bits: Mapping[str, Width]) -> float:
        """Φ = (E (Σ_i ‖J_i u_i‖)²)^½: on each sample the layers' errors all point the same way.

        At most Σ A_i e_i, by Minkowski's inequality: samples differ in which layers' errors they feel.
        """
        return math.sqrt(float(self._rows(bits).norm(dim=2).sum(0).square().mean()))

    def _rows(self, bits: Mapping[str, Width]) -> Tensor:
        """J_i u_i, shape (k, N, probes)."""
        return torch.stack([self.components[name][b] for name, b in bits.items()])


def carried_errors(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    deltas: Mapping[str, Mapping[W, Tensor]],
    shifts: Mapping[str, Mapping[W, Tensor]],
    *,
    seed: int = 0,
    memory: int = 2**27,
) -> CarriedErrors:
    """J_i u_i of u_i = Δ_i(b) z_i + δ_i(b) for every layer and bit-width at once (theory: composition, ``jacobian``).

    A probe v at the output is pulled back to every layer's output by one backward pass, g_i = J_iᵀ v, and
    ⟨v, J_i u⟩ = ⟨g_i, u⟩ for any error u there. Up to 16 outputs a sample the probes are the outputs and the result is
    exact; beyond that they are 16 random sign vectors, drawn anew for each sample (Hutchinson 1990). Costs a forward
    and at most 16 backward passes, and one product of each layer and bit-width, however many layers there are.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b).
        shifts: Layer name to bits to δ_i(b), one number an output channel, such as from ``bias_corrections``; layers
            that are not named have none.
        seed: Seed of the probes; the same for a sample however the samples are cut into batches.
        memory: Bytes that some samples may take, by a rough count; so many samples are run at a time.

    Returns:
        The errors; zeros for a layer that no batch reaches.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> _ = net[1].weight.data.fill_(3.0)
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> carried = carried_errors(net, find_layers(net, x)[:1], [x], {"0": {2: torch.tensor([[0.5, 9.0]])}}, {})
        >>> carried.errors["0"][2], carried.at_output("0", 2)
        (0.5, 1.5)
    """
    components: dict[str, dict[Width, list[Tensor]]] = {x.name: {b: [] for b in deltas[x.name]} for x in layers}
    squares: dict[str, dict[Width, float]] = {x.name: dict.fromkeys(deltas[x.name], 0.0) for x in layers}
    first = 0
    for batch in _parts(model, layers, batches, deltas, memory):
        calls, output = _run(model, layers, batch)
        count = batch_size(batch)
        us = {
            (layer.name, b): [
                _shifted(
                    layer, apply_weight(module, delta, z, zero.shape[2:]).detach(), shifts.get(layer.name, {}).get(b)
                )
                for module, z, zero in calls[layer.name]
            ]
            for layer in layers
            for b, delta in deltas[layer.name].items()
        }
        for (name, b), errors in us.items():
            squares[name][b] += sum(float(u.double().square().sum()) for u in errors)
        products: dict[tuple[str, W], list[Tensor]] = {key: [] for key in us}
        rows = output.reshape(count, -1)
        for probe in _probes(rows, [generator(seed, f"carried/{i}") for i in range(first, first + count)]):
            pulled = _pull(rows, probe, calls)
            for (name, b), errors in us.items():
                inner = (_by_sample(g * u, count).double().sum(1) for g, u in zip(pulled[name], errors, strict=True))
                products[name, b].append(sum(inner, torch.zeros(count, dtype=torch.float64, device=output.device)))
        for (name, b), columns in products.items():
            components[name][b].append(torch.stack(columns, dim=1).cpu())
        first += count
    samples = sum(map(batch_size, batches))
    return CarriedErrors(
        {name: {b: _one_below_another(rows) for b, rows in by_bits.items()} for name, by_bits in components.items()},
        {name: {b: (total / samples) ** 0.5 for b, total in by_bits.items()} for name, by_bits in squares.items()},
    )


def _one_below_another(parts: Sequence[Tensor]) -> Tensor:
    """Components of all samples; samples with fewer outputs than others, such as short sequences, have zeros behind."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, most - part.shape[1])) for part in parts])


def _shifted(layer: Layer, error: Tensor, shift: Tensor | None) -> Tensor:
    return error if shift is None else error + along_channels(layer, shift, error)


def _run(model: nn.Module, layers: Sequence[Layer], batch: Any) -> tuple[Calls, Tensor]:
    """The output of a batch, and every call of the layers: module, input, and a zero added to its output."""
    names = {id(module): layer.name for layer in layers for module in layer_modules(model, layer)}
    calls: Calls = {layer.name: [] for layer in layers}
    keep = padding_of(batch)

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        # Gradients by this zero exist whether or not a weight or the input has one, and after changes in place.
        zero = torch.zeros_like(output, requires_grad=True)
        calls[names[id(module)]].append((module, padding_zeroed(module, inputs, keep).detach().clone(), zero))
        return output + zero

    with torch.enable_grad(), watching([m for m in model.modules() if id(m) in names], hook):
        return calls, run_model(model, batch).values


def _pull(output: Tensor, probe: Tensor, calls: Calls) -> dict[str, list[Tensor]]:
    """J_iᵀ v at the output of every call."""
    zeros = [zero for seen in calls.values() for _, _, zero in seen]
    pulled = iter(
        torch.autograd.grad(output, zeros, probe, retain_graph=True, materialize_grads=True)
        if output.requires_grad
        else [torch.zeros_like(zero) for zero in zeros]
    )
    return {name: [next(pulled) for _ in seen] for name, seen in calls.items()}


def _probes(output: Tensor, draws: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Unit vectors of a few outputs, or each sample's random signs, scaled so that squared norms are kept."""
    count, width = output.shape
    if width <= _MOST_PROBES:
        for unit in torch.eye(width).to(output):
            yield unit.expand(count, width)
        return
    for _ in range(_MOST_PROBES):
        signs = torch.stack([torch.randint(0, 2, (width,), generator=draw) for draw in draws]) * 2 - 1
        yield signs.to(output) / _MOST_PROBES**0.5


def _by_sample(values: Tensor, count: int) -> Tensor:
    return values.reshape(count, -1)


def _parts(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    deltas: Mapping[str, Mapping[W, Tensor]],
    memory: int,
) -> Iterator[Any]:
    """The batches, cut to what fits in memory; one sample at a time where samples do not lie along the first axis."""
    probe = take_samples(batches, 2)[0]
    calls, output = _run(model, layers, probe)
    count = batch_size(probe)
    tensors = {name: len(deltas[name]) + _TENSORS_HELD for name in calls}
    numbers = sum(tensors[name] * zero.numel() for name, seen in calls.items() for _, _, zero in seen) / count
    most = max(int(memory / (4 * max(numbers, 1))), 1) if _samples_first(output, calls, count) else 1
    for batch in batches:
        for start in range(0, batch_size(batch), most):
            yield take_samples([batch], most, skip=start)[0]


def _samples_first(output: Tensor, calls: Calls, count: int) -> bool:
    """Whether the first sample's output depends on what is stored first in every layer's output, and on no more."""
    if output.numel() % count or any(zero.numel() % count for seen in calls.values() for _, _, zero in seen):
        return False
    rows = output.reshape(count, -1)
    first = torch.zeros_like(rows)
    first[0] = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    pulled = _pull(rows, first, calls)
    return not any(bool(_by_sample(g, count)[1:].any()) for grads in pulled.values() for g in grads)
