"""Layers: what can be quantized in a network, found once and described by plain numbers."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_caq.errors import LayerError, OptionError
from lightning_caq.network.batches import batch_size, check_model_takes
from lightning_caq.network.hooks import watching
from lightning_caq.network.parts.part import held_weight, weight_identity
from lightning_caq.sizes import LayerSizes

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}


@dataclass(frozen=True)
class Layer:
    """A weight that can be quantized, with the module, or the tied modules, that hold it.

    Attributes:
        name: Qualified name of the first module that holds the weight, as in ``model.named_modules()``.
        kind: What the layer is, such as ``"linear"`` or ``"conv2d"``.
        shape: Shape of the weight.
        groups: Groups of a convolution, otherwise 1.
        macs: Multiply–accumulates of one forward pass of one sample, m_i; 0 where no batch reached the layer.
        calls: How often the weight is applied in one forward pass.
        batchnorm: Name of the batch-norm that takes the layer's output as it is, or ``None``.
        modules: Every module name under which the weight is reached; more than one where weights are tied
            or a module is used under two names.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    macs: int = 0
    calls: int = 0
    batchnorm: str | None = None
    modules: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights, n_i."""
        return int(torch.Size(self.shape).numel())

    @property
    def transposed(self) -> bool:
        """Whether the weight holds input channels first, as a transposed convolution does."""
        return self.kind.startswith("conv_transpose")

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Shape of one scale per output channel, broadcastable to the weight.

        A transposed convolution with groups keeps its output channels per group, which share the second axis of the
        weight; one scale then serves the same place in every group.

        Example:
            >>> Layer("net.0", "conv2d", (16, 3, 3, 3)).channel_shape
            (16, 1, 1, 1)
        """
        axis = 1 if self.transposed else 0
        return tuple(size if d == axis else 1 for d, size in enumerate(self.shape))

    @property
    def channel_axis(self) -> int:
        """Axis of the output channels in the layer's output, counted from its end.

        Example:
            >>> Layer("conv", "conv2d", (16, 3, 3, 3)).channel_axis, Layer("fc", "linear", (10, 16)).channel_axis
            (-3, -1)
        """
        return 1 - len(self.shape) if self.kind.startswith("conv") else -1

    @property
    def channels(self) -> int:
        """Number of scales, one an output channel (a row, for an embedding)."""
        return int(torch.Size(self.channel_shape).numel())


def layer_sizes(layers: Sequence[Layer], unquantized: int = 0) -> LayerSizes:
    """The numbers a budget needs of ``layers``."""
    weights, channels = tuple(x.weights for x in layers), tuple(x.channels for x in layers)
    return LayerSizes(weights, channels, unquantized, macs=tuple(x.macs for x in layers))


def layer_module(model: nn.Module, layer: Layer) -> nn.Module:
    """The module that holds the layer's weight."""
    return model.get_submodule(layer.name)


def layer_modules(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """Every module that applies the layer's weight, each once."""
    return list({id(module): module for module in map(model.get_submodule, layer.modules)}.values())


def layer_weight(model: nn.Module, layer: Layer) -> nn.Parameter:
    """The layer's weight, the live parameter itself."""
    weight = layer_module(model, layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


@contextmanager
def requiring_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let autograd see some weights, frozen ones too, for a while.

    Example:
        >>> weight = nn.Linear(1, 1).requires_grad_(False).weight
        >>> with requiring_gradients([weight]):
        ...     print(weight.requires_grad)
        True
        >>> weight.requires_grad
        False
    """
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def size_arguments(module: nn.Module, size: Sequence[int] | None) -> dict[str, list[int]]:
    """How a module is told the size of its output: a transposed convolution can give several for one input.

    Args:
        module: The module.
        size: Size of its output past the channels, of a call that is known.

    Example:
        >>> size_arguments(nn.ConvTranspose1d(1, 1, 2, 2), (9,)), size_arguments(nn.Conv1d(1, 1, 2), (9,))
        ({'output_size': [9]}, {})
    """
    if size is None or not isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return {}
    takes = "output_size" in inspect.signature(module.forward).parameters
    return {"output_size": list(size)} if takes else {}


def apply_weight(module: nn.Module, weight: Tensor, inputs: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """What a layer gives with another weight and no bias, past its hooks: a linear map in the weight and in the input.

    Args:
        module: The layer.
        weight: The weight to use.
        inputs: Its input.
        size: Size of its output past the channels, where a transposed convolution was asked for one.

    Example:
        >>> fc = nn.Linear(2, 1)
        >>> apply_weight(fc, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    parameters = module._parameters
    bias = parameters.get("bias")
    replaced: dict[str, Any] = {**parameters, "weight": weight}
    if bias is not None:
        replaced["bias"] = torch.zeros_like(bias)
    try:
        module._parameters = replaced
        output: Tensor = module.forward(inputs, **size_arguments(module, size))
    finally:
        module._parameters = parameters
    return output


def find_layers(
    model: nn.Module,
    batch: Any,
    *others: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[Layer]:
    """Find every weight that can be quantized, and run a batch to learn the order and the cost of the layers.

    Linear layers, convolutions, transposed convolutions and embeddings are found, subclasses of them too, and the parts
    of an expanded network (``network.parts``). A weight that several modules share is one layer. Parametrized weights
    (``torch.nn.utils.parametrize``) are left alone.

    Args:
        model: The network; left as it was.
        batch: One calibration batch, on the device of the model.
        others: More of them, run only as long as they may show layers that none before has reached, as where samples
            are sent to experts by their values.
        include: Shell patterns of layer names to quantize, such as ``"encoder.*"``; all by default.
        exclude: Shell patterns of layer names to leave in float32.

    Returns:
        The layers in their order of execution; those that no batch reached come last, with ``macs=0``.

    Raises:
        LayerError: If no layer is left, or if a weight holds NaN or infinite values.
        OptionError: If a pattern matches no layer.
        CalibrationError: If the model cannot take the batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(x.name, x.kind, x.weights, x.macs) for x in find_layers(net, torch.zeros(3, 4))]
        [('0', 'linear', 32, 32), ('2', 'linear', 16, 16)]
    """
    return _in_execution_order(model, chosen_layers(model, include, exclude), (batch, *others))


def chosen_layers(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[Layer]:
    """The layers that patterns choose, in the order of ``named_modules``; costs and order of execution not yet known.

    Args:
        model: The network.
        include: Shell patterns of layer names; all by default.
        exclude: Shell patterns of those to leave out.

    Raises:
        LayerError: If there is no layer to quantize, a lazy one is not initialised, or a weight holds NaN or infinite
            values.
        OptionError: If a pattern matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [layer.name for layer in chosen_layers(net, exclude=["2"])]
        ['0']
    """
    every = quantizable_layers(model)
    if not every:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise LayerError(f"{type(model).__name__} has no layer that can be quantized; known kinds are {known}.")
    chosen = _select(every, include, exclude)
    for layer in chosen:
        if not bool(torch.isfinite(layer_weight(model, layer)).all()):
            raise LayerError(
                f"Layer '{layer.name}' holds NaN or infinite weights; only finite weights can be quantized."
            )
    return chosen


def kind_of(module: nn.Module) -> str | None:
    """What a module is, such as ``"linear"``; ``None`` if it cannot be quantized.

    Example:
        >>> kind_of(nn.Conv2d(1, 1, 1)), kind_of(nn.ReLU())
        ('conv2d', None)
    """
    return next((KINDS[base] for base in type(module).__mro__ if base in KINDS), None)


def quantizable_layers(model: nn.Module) -> list[Layer]:
    """Every layer of a known kind in the order of ``named_modules``; costs and order of execution not yet known."""
    found: dict[Any, Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        weight = None if kind is None else held_weight(module)
        if kind is None or weight is None or (not is_lazy(weight) and not weight.numel()):
            continue
        if is_lazy(weight):
            raise LayerError(f"Layer '{name}' is lazy and not initialised; run one batch through the model first.")
        identity = weight_identity(module)
        known = found.get(identity)
        if known is not None:
            # A word table that a linear layer shares, as in language models, counts as the table.
            shared = kind if kind == "embedding" else known.kind
            found[identity] = replace(known, kind=shared, modules=(*known.modules, name))
        else:
            groups = int(getattr(module, "groups", 1))
            found[identity] = Layer(name, kind, tuple(weight.shape), groups, modules=(name,))
    return list(found.values())


def _select(layers: list[Layer], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[Layer]:
    names = ", ".join(f"'{x.name}'" for x in layers[:8]) + (", ..." if len(layers) > 8 else "")
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not _matching(layers, [pattern]):
                raise OptionError(f"{option} pattern '{pattern}' matches no layer; the layers are {names}.")
    included = layers if include is None else _matching(layers, include)
    excluded = _matching(layers, exclude or ())
    kept = [layer for layer in layers if layer in included and layer not in excluded]
    if not kept:
        raise LayerError(f"include and exclude leave no layer to quantize; the layers are {names}.")
    return kept


def _matching(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """The layers that patterns name: those with the very name if there are any, since brackets mean more to a shell."""
    exact = {name for layer in layers for name in layer.modules}
    return [
        layer
        for layer in layers
        if any(p in layer.modules if p in exact else matches(layer.modules, p) for p in patterns)
    ]


def matches(names: Sequence[str], pattern: str) -> bool:
    """Whether one of some names is a pattern, or is matched by it as a shell pattern.

    Example:
        >>> matches(["net.0"], "net.*"), matches(["blocks[0]"], "blocks[0]"), matches(["blocks0"], "blocks[0]")
        (True, True, True)
    """
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


@dataclass
class _Trace:
    """What one forward pass showed of a layer."""

    positions: int = 0
    calls: int = 0
    batchnorm: str | None = None


def _in_execution_order(model: nn.Module, layers: list[Layer], batches: Sequence[Any]) -> list[Layer]:
    """Run batches; sort the layers as they ran, and give each its cost and the batch-norm behind it."""
    by_name = {layer.name: layer for layer in layers}
    reached: list[Layer] = []
    for batch in batches:
        if len(reached) == len(layers):
            break
        traces: dict[str, _Trace] = {}
        with _tracing(model, layers, traces), torch.no_grad():
            check_model_takes(model, batch)
        samples = max(batch_size(batch), 1)
        place, known = 0, {layer.name for layer in reached}
        for name, trace in traces.items():
            if name in known:
                place = next(index for index, layer in enumerate(reached) if layer.name == name) + 1
                continue
            cost = by_name[name].weights * trace.positions // samples
            reached.insert(
                place, replace(by_name[name], macs=cost, calls=trace.calls, batchnorm=trace.batchnorm)
            )  # behind what ran before it
            place += 1
    names = {layer.name for layer in reached}
    return reached + [layer for layer in layers if layer.name not in names]


@contextmanager
def _tracing(model: nn.Module, layers: list[Layer], traces: dict[str, _Trace]) -> Iterator[None]:
    """While open, forward passes fill ``traces`` in the order in which the layers run."""
    outputs: dict[int, tuple[Tensor, str]] = {}  # the tensors are kept, so that no identity is used twice
    watched = {id(module): layer for layer in layers for module in layer_modules(model, layer)}
    batchnorms = {id(m): name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if id(module) in batchnorms:
            if id(inputs) in outputs:
                traces[outputs[id(inputs)][1]].batchnorm = batchnorms[id(module)]
            return
        layer = watched[id(module)]
        trace = traces.setdefault(layer.name, _Trace())
        trace.calls += 1
        outputs[id(output)] = (output, layer.name)
        if not isinstance(module, nn.Embedding):  # a look-up multiplies nothing
            # A weight is applied once an output position; that of a transposed convolution once an input position.
            side = inputs if layer.transposed else output
            spatial = side.shape[2:] if layer.kind.startswith("conv") else side.shape[1:-1]
            trace.positions += len(side) * spatial.numel()

    with watching([m for m in model.modules() if id(m) in watched or id(m) in batchnorms], hook):
        yield
