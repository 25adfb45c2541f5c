"""Recurrent layers of torch: the weights by input and by state of every layer and direction are layers.

torch runs all steps in one operator. Where calls matter, the steps are taken one by one: the weight by input is
applied to all of them at once, that by state once a step. Where only weights matter, the operator is given those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.parts.kind import Kind
from lightning_caq.network.parts.part import View, parts_of

State = tuple[Tensor, ...]


def _lstm(inputs: Tensor, states: Tensor, state: State) -> State:
    i, f, g, o = (inputs + states).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(inputs: Tensor, states: Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = inputs.chunk(3, -1), states.chunk(3, -1)
    new = (n + (r + r_h).sigmoid() * n_h).tanh()
    z = (z + z_h).sigmoid()
    return (new + z * (state[0] - new),)


def _tanh(inputs: Tensor, states: Tensor, state: State) -> State:
    return ((inputs + states).tanh(),)


def _relu(inputs: Tensor, states: Tensor, state: State) -> State:
    return ((inputs + states).relu(),)


Step = Callable[[Tensor, Tensor, State], State]
"""The next state, from what inputs and state give and from the state; the equations of torch's documentation."""

_STEPS: dict[Any, Step] = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}
_CELLS: dict[Any, Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}


def part_name(parameter: str) -> str:
    """Name of the part of a recurrent layer.

    Example:
        >>> part_name("weight_ih_l0_reverse"), part_name("weight_hh")
        ('ih_l0_reverse', 'hh')
    """
    return parameter.removeprefix("weight_")


def _views(module: nn.Module) -> dict[str, View]:
    return {part_name(name): View(name) for name, p in module._parameters.items() if p is not None and p.ndim == 2}


def _route_layer(module: nn.RNNBase, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func not in _STEPS:
        return NotImplemented
    packed = isinstance(args[3], list)  # its arguments are data, sizes, state, weights; else input, state, weights
    # torch's exporter gives the ONNX operator, which knows no projected states, a cell of their size.
    projected = getattr(module, "proj_size", 0) > 0 and torch.compiler.is_compiling()
    if projected or any(part.watched for part in parts_of(module)):
        sequence = _Packed(args[0], args[1].tolist()) if packed else _Padded(args[0], module.batch_first)
        state = args[2] if packed else args[1]
        output, last = _unrolled(module, _STEPS[func], sequence, state if isinstance(state, tuple) else (state,))
        return sequence.joined(output), *last
    place = 3 if packed else 2
    with warnings.catch_warnings():  # copies of the weights lie where they lie
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk of memory")
        return func(*args[:place], _applied(module), *args[place + 1 :], **kwargs)


def _applied(module: nn.RNNBase) -> list[Tensor]:
    """All weights and biases, in torch's order, as inputs are multiplied by them."""
    names: Sequence[str] = module._flat_weights_names
    parts = {part.view.parameter: part for part in parts_of(module)}
    return [parts[name].applied_weight if name in parts else getattr(module, name) for name in names]


@dataclass(frozen=True)
class _Padded:
    """Sequences of one length."""

    data: Tensor
    batch_first: bool

    @property
    def sizes(self) -> list[int]:
        """How many samples each step has."""
        samples, length = self.data.shape[:2] if self.batch_first else self.data.shape[1::-1]
        return [samples] * length

    @property
    def inputs(self) -> Tensor:
        """What the first layer is given, samples first."""
        return self.data if self.batch_first else self.data.transpose(0, 1)

    def steps(self, values: Tensor) -> Sequence[Tensor]:
        """Values of every step."""
        return values.unbind(1)

    def together(self, steps: Sequence[Tensor]) -> Tensor:
        """What ``steps`` takes apart."""
        return torch.stack(list(steps), 1)

    def joined(self, output: Tensor) -> Tensor:
        """The output as torch gives it."""
        return output if self.batch_first else output.transpose(0, 1)


@dataclass(frozen=True)
class _Packed:
    """Sequences of several lengths, the longest first, without padding."""

    inputs: Tensor
    sizes: list[int]

    def steps(self, values: Tensor) -> Sequence[Tensor]:
        """Values of every step."""
        return torch.split(values, self.sizes)

    def together(self, steps: Sequence[Tensor]) -> Tensor:
        """What ``steps`` takes apart."""
        return torch.cat(list(steps))

    def joined(self, output: Tensor) -> Tensor:
        """The output as torch gives it."""
        return output


def _unrolled(module: Any, step: Step, sequence: _Padded | _Packed, state: State) -> tuple[Tensor, State]:
    """Outputs and last states, one step after the other."""
    values, last = sequence.inputs, []
    directions = ("", "_reverse")[: 2 if module.bidirectional else 1]
    for layer in range(module.num_layers):
        outputs = []
        for direction, suffix in enumerate(directions):
            first = tuple(part[layer * len(directions) + direction] for part in state)
            output, end = _direction(module, step, sequence, values, f"l{layer}{suffix}", first)
            outputs.append(output)
            last.append(end)
        values = torch.cat(outputs, -1)
        if layer + 1 < module.num_layers:
            values = F.dropout(values, module.dropout, module.training)
    return values, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _direction(
    module: Any, step: Step, sequence: _Padded | _Packed, values: Tensor, name: str, first: State
) -> tuple[Tensor, State]:
    """One layer in one direction."""
    weigh_input, weigh_state = getattr(module, f"ih_{name}"), getattr(module, f"hh_{name}")
    project = getattr(module, f"hr_{name}", None)
    inputs = sequence.steps(_plus(weigh_input(values), module, f"bias_ih_{name}"))
    backwards = name.endswith("_reverse")
    outputs: dict[int, Tensor] = {}
    state, ended = (
        tuple(part[:0] for part in first),
        [],
    )  # states of samples that are under way, and of those that ended
    for t in reversed(range(len(inputs))) if backwards else range(len(inputs)):
        size = sequence.sizes[t]
        if len(state[0]) < size:  # samples begin: all at once, or backwards the longest first
            state = tuple(torch.cat([part, start[len(part) : size]]) for part, start in zip(state, first, strict=True))
        elif len(state[0]) > size:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = step(inputs[t], _plus(weigh_state(state[0]), module, f"bias_hh_{name}"), state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs[t] = state[0]
    ended.append(state)
    end = tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
    return sequence.together([outputs[t] for t in range(len(inputs))]), end


def _plus(values: Tensor, module: Any, bias: str) -> Tensor:
    found = module._parameters.get(bias)
    return values if found is None else values + found


def _route_cell(module: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func not in _CELLS:
        return NotImplemented
    inputs, state = args[:2]
    lstm = isinstance(state, tuple)
    given, states = _plus(module.ih(inputs), module, "bias_ih"), (state if lstm else (state,))
    found = _CELLS[func](given, _plus(module.hh(states[0]), module, "bias_hh"), states)
    return found if lstm else found[0]


RECURRENT = Kind(
    name="recurrent",
    covers=lambda module: isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)),
    views=_views,
    route=_route_layer,
)
CELL = Kind(
    name="cell",
    covers=lambda module: isinstance(module, nn.RNNCellBase),
    views=_views,
    route=_route_cell,
)
