"""Preparation: a few runs on one batch that find how a network is run, and refuse what cannot work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.arguments import Arguments, possible_arguments
from lightning_caq.network.batches import FAILURES, calibration_batches, cannot_take
from lightning_caq.network.cutting import find_axes
from lightning_caq.network.forward import Batch, Forward, Route, arguments_route, no_outputs, run_model
from lightning_caq.network.hooks import watching
from lightning_caq.network.layers import layer_modules, layer_weight, quantizable_layers, requiring_gradients
from lightning_caq.network.meaning import (
    Evidence,
    Output,
    input_padding,
    meaning_of,
    tensors_by_use,
    torchmetrics_of,
)
from lightning_caq.network.observe import Loss, Observation, loss_route, observe
from lightning_caq.network.outputs import KINDS, Head, output_tensors, read_outputs
from lightning_caq.utilities.isolation import seeded
from lightning_caq.utilities.structures import Path, describe, named_tensors

ForwardFunction = Callable[[nn.Module, Any], Any]
"""What a user runs a module by: a function of the module and a batch that returns its outputs."""

_SCALED_APART = 32  # columns of values; more are one field, such as the pixels of an image
_NOISE = 0.1  # of a weight, about what 3 bits make, to see whether shapes of outputs depend on it


@dataclass(frozen=True)
class ModelUse:
    """How a user says that a module is run, and what its outputs mean.

    Attributes:
        forward_fn: Runs it: a function of the module and a batch, or the path that one is imported from.
        output: ``"auto"``, ``"classes"``, ``"values"``, or a function that selects among what is returned.
        class_axis: The axis of classes; found by itself as a rule.
    """

    forward_fn: ForwardFunction | str | None = None
    output: Output = "auto"
    class_axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.output, str) and self.output not in ("auto", *KINDS) and "." not in self.output:
            raise OptionError(
                f"output={self.output!r} is not known; choose from 'auto', 'classes', 'values', or give a function of "
                "what the network returns."
            )
        if not isinstance(self.output, str) and not callable(self.output):
            raise OptionError(f"output={self.output!r} is neither a name nor a function of what the network returns.")
        if self.class_axis is not None and type(self.class_axis) is not int:
            raise OptionError(f"class_axis={self.class_axis!r} is not allowed; give a whole number, or None.")
        for name in ("forward_fn", "output"):
            value = getattr(self, name)
            if isinstance(value, str) and "." in value:
                object.__setattr__(self, name, imported(name, value))
        if self.forward_fn is not None and not callable(self.forward_fn):
            raise OptionError(f"forward_fn={self.forward_fn!r} is not a function of (module, batch).")


def imported(option: str, path: str) -> Any:
    """What a dotted path names.

    Raises:
        OptionError: If there is nothing of that name.

    Example:
        >>> imported("forward_fn", "torch.nn.functional.relu").__name__
        'relu'
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"{option}={path!r} cannot be imported ({error}); give 'package.module.function'.") from error


def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    samples: int,
    *,
    use: ModelUse | None = None,
    loss: Loss | None = None,
    task: bool = False,
    device: torch.device | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> list[Batch]:
    """Collect calibration batches, each with how the network is run on it.

    Args:
        model: The network, in eval mode, where gradients can be taken (``curvature_safe``).
        batches: Re-iterable batches; batches of an earlier call are taken as they are.
        samples: How many samples to keep.
        use: What the user says of it.
        loss: The loss of a model and a batch, if one is known; it tells how the module is run and what outputs mean.
        task: Whether that loss is the objective.
        device: Where to move tensors.
        convert: Called with each batch, once it is there.

    Returns:
        The batches.

    Raises:
        CalibrationError: If the batches cannot be used, or the network cannot be run on them.
        OptionError: If ``class_axis`` does not fit.

    Example:
        >>> found = prepare(nn.Linear(3, 4), [(torch.randn(5, 3), torch.zeros(5).long())], 4)
        >>> found[0].size, found[0].forward.heads[0].kind
        (4, 'classes')
    """
    use = use or ModelUse()
    collected = calibration_batches(
        batches,
        samples,
        device,
        convert=convert,
        bind=lambda batch: find_forward(model, batch, use=use, loss=loss, task=task),
    )
    forward = collected[0].forward
    for index, batch in enumerate(collected):
        _check_inputs(batch, index)
    if any(_unscaled(head) for head in forward.heads) or len(forward.heads) > 1:
        forward = replace(forward, heads=scaled(model, collected, forward.heads))
        collected = [replace(batch, forward=forward) for batch in collected]
    return collected


def _unscaled(head: Head) -> bool:
    return head.kind == "values" and head.std is None


def takes(model: nn.Module, data: Any) -> bool:
    """Whether a network can be run on a batch.

    Example:
        >>> takes(nn.Linear(2, 1), (torch.zeros(3, 2), "label")), takes(nn.Linear(2, 1), "text")
        (True, False)
    """
    try:
        _route(model, data, ModelUse(), Observation(), None)
    except CalibrationError:
        return False
    return True


def find_forward(
    model: nn.Module, data: Any, *, use: ModelUse, loss: Loss | None = None, task: bool = False
) -> Forward:
    """How a network is run on batches like this one; see ``prepare``."""
    observed = _observed(model, data, loss)
    route, arguments = _route(model, data, use, observed, loss if task or not _has_forward(model) else None)
    run = _selecting(route, use.output)
    returned, random = _returned(model, run, data)
    forward = Forward(run, (), random=random)
    passed = arguments.uses if arguments is not None else lambda path: True
    inputs, labels = tensors_by_use(data, passed)
    with torch.no_grad():
        axes = find_axes(lambda x: forward.raw(model, x), data, returned, passed, FAILURES, random=random)
    names = {p: arguments.name_of(p, model) for p in inputs} if arguments is not None else {}
    evidence = Evidence(observed.losses, inputs, labels, names, torchmetrics_of(model))
    heads, notes = _heads(model, data, returned, axes, use, evidence)
    forward = replace(
        forward,
        heads=heads,
        axes=axes[0] if axes else {},
        cuttable=axes is not None,
        inputs=frozenset(inputs),
        padding=input_padding(evidence),
        notes=tuple(notes) if axes else (*notes, _WHOLE),
    )
    _check_outputs(model, Batch(data, forward), returned)
    return _reaching(model, data, forward)


_WHOLE = (
    "Samples cannot be taken out of a batch (outputs depend on other samples, or tensors belong together as nodes and "
    "edges do): a batch counts as one sample."
)


def _has_forward(model: nn.Module) -> bool:
    """Whether a module has a forward of its own, not that of nn.Module, which raises."""
    if "forward" in vars(model):
        return True
    owner = next(base for base in type(model).__mro__ if "forward" in vars(base))
    lightning = owner.__name__ == "LightningModule" and owner.__module__.startswith(
        ("lightning.", "pytorch_lightning.")
    )
    return owner is not nn.Module and not lightning


def _observed(model: nn.Module, data: Any, loss: Loss | None) -> Observation:
    if loss is None:
        return Observation()
    try:
        return observe(model, data, loss)
    except Exception:  # it may need labels, a trainer, or anything else; if it is the objective, that is said there
        return Observation()


def _route(
    model: nn.Module, data: Any, use: ModelUse, observed: Observation, loss: Loss | None
) -> tuple[Route, Arguments | None]:
    """What runs the network, and the arguments that it is called with, if it is called by them."""
    if use.forward_fn is not None:
        assert callable(use.forward_fn)
        return use.forward_fn, None
    first: Exception | None = None
    if _has_forward(model):
        seen = [observed.arguments] if observed.arguments is not None else []
        for arguments in (*seen, *possible_arguments(model, data)):
            route = arguments_route(arguments)
            try:
                with torch.no_grad():
                    returned = Forward(route, ()).raw(model, data)
            except FAILURES as error:
                first = first or error
                continue
            if output_tensors(returned) or not isinstance(use.output, str):
                return route, arguments
            first = first or CalibrationError(no_outputs(model, data))
    if loss is not None:
        return loss_route(loss), None
    if isinstance(first, CalibrationError):
        raise first
    if first is None:
        raise CalibrationError(
            f"{type(model).__name__} has no forward; give forward_fn, a function of (module, batch) that returns the "
            "outputs, or choose objective='task', which runs training_step."
        )
    raise CalibrationError(cannot_take(model, data, first)) from first


def _selecting(route: Route, output: Output) -> Route:
    if isinstance(output, str):
        return route
    return lambda model, data: output(route(model, data))


def _returned(model: nn.Module, run: Route, data: Any) -> tuple[Any, bool]:
    """What a network returns for a batch, and whether that differs from run to run, as it draws random numbers."""
    returned = []
    for seed in (0, 1):
        with torch.no_grad(), seeded(seed):
            try:
                returned.append(Forward(run, ()).raw(model, data))
            except FAILURES as error:
                raise CalibrationError(cannot_take(model, data, error)) from error
    pairs = zip(*map(output_tensors, returned), strict=False)
    same = [a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, equal_nan=True) for (_, a), (_, b) in pairs]
    return returned[0], not all(same)


def _check_inputs(batch: Batch, index: int) -> None:
    """Refuse NaN and infinite inputs; −∞ is what masks hold. Labels are not looked at."""
    for path, tensor in named_tensors(batch.data):
        if path not in batch.forward.inputs or not tensor.is_floating_point():
            continue
        if bool((tensor.isnan() | tensor.isposinf()).any()):
            raise CalibrationError(
                f"Calibration batch {index} holds NaN or infinite values: {describe(batch.data)}; leave them out."
            )


def _heads(
    model: nn.Module,
    data: Any,
    returned: Any,
    axes: tuple[dict[Path, int], dict[Path, int]] | None,
    use: ModelUse,
    evidence: Evidence,
) -> tuple[tuple[Head, ...], list[str]]:
    tensors = output_tensors(returned)
    if not tensors:
        raise CalibrationError(no_outputs(model, data))
    counted = [(p, t) for p, t in tensors if axes is None or p in axes[1]]
    heads, notes = [], []
    for path, tensor in counted:
        axis = axes[1][path] if axes is not None else None
        head, why = meaning_of(
            path, tensor, axis, output=use.output, class_axis=use.class_axis, evidence=evidence, alone=len(counted) == 1
        )
        heads.append(head)
        masked = "; positions that a mask or the labels leave out do not count" if head.masks else ""
        notes.append(f"Output {head.name!r} of shape {list(tensor.shape)} is taken as {head.kind}: {why}{masked}.")
    ignored = [path for path, _ in tensors if path not in {head.path for head in heads}]
    if ignored:
        listed = ", ".join(repr(".".join(map(str, path))) for path in ignored)
        notes.append(f"The outputs {listed} are the same for every sample and do not count.")
    return tuple(heads), notes


def _check_outputs(model: nn.Module, batch: Batch, returned: Any) -> None:
    """Refuse outputs that are not finite, and those whose shape depends on the weights."""
    with torch.no_grad():
        before = read_outputs(batch.forward.heads, returned, batch.size, batch.data)
        if not bool(torch.isfinite(before.values).all()):
            raise CalibrationError(
                f"{type(model).__name__} returns NaN or infinite outputs on the first calibration batch; output, a "
                "function of what it returns, can select or mend them."
            )
        weights = [layer_weight(model, layer) for layer in quantizable_layers(model)]
        with _noisy(weights):
            try:
                after = run_model(model, batch)
                changed = before.values.shape != after.values.shape
            except (LookupError, RuntimeError, ValueError):
                changed = True
    if changed:
        raise CalibrationError(
            f"The shapes of what {type(model).__name__} returns change with its weights, as those of chosen detections "
            "do, so they cannot be compared; give output, a function that selects outputs of fixed shapes, or "
            "forward_fn, a function of (module, batch) that returns what comes before the choice."
        )


@contextmanager
def _noisy(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    own = [weight.detach().clone() for weight in weights]
    draws = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=draws).to(weight)
            weight.add_(noise * _NOISE * weight.abs().mean())
        yield
    finally:
        for weight, value in zip(weights, own, strict=True):
            weight.copy_(value)


def _reaching(model: nn.Module, data: Any, forward: Forward) -> Forward:
    """Let gradients through where the network cuts them off, if that shows more layers; name those that stay unseen."""
    batch = Batch(data, forward)
    sample = batch.take([0, 0] if batch.size == 1 else [0, 1])
    unseen = _unseen(model, sample)
    if not unseen:
        return forward
    through = replace(sample, forward=replace(forward, through=True))
    try:
        still = _unseen(model, through)
    except FAILURES:
        still = unseen
    if len(still) < len(unseen):
        listed = ", ".join(f"'{name}'" for name in unseen if name not in still)
        note = f"Gradients pass through no_grad or detach to {listed} while curvature is measured."
        forward = replace(forward, through=True, notes=(*forward.notes, note))
    if still:
        listed = ", ".join(f"'{name}'" for name in still)
        note = f"No gradient of the outputs reaches {listed}: their curvature cannot be seen."
        forward = replace(forward, notes=(*forward.notes, note))
    return forward


def _unseen(model: nn.Module, batch: Batch) -> list[str]:
    """Layers that a batch calls, and by whose weight the outputs have no gradient."""
    layers = quantizable_layers(model)
    called: set[str] = set()
    names = {id(m): layer.name for layer in layers for m in layer_modules(model, layer)}

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        called.add(names[id(module)])

    if not layers:
        return []
    weights = [layer_weight(model, layer) for layer in layers]
    watched = [m for m in model.modules() if id(m) in names]
    with requiring_gradients(weights), watching(watched, hook), torch.enable_grad():
        values = run_model(model, batch).values
        if not values.requires_grad:
            return [layer.name for layer in layers if layer.name in called]
        draws = torch.Generator().manual_seed(0)
        seed = torch.randn(values.shape, generator=draws).to(values)
        gradients = torch.autograd.grad(values, weights, seed, allow_unused=True)
    return [x.name for x, g in zip(layers, gradients, strict=True) if x.name in called and g is None]


def scaled(model: nn.Module, batches: Sequence[Batch], heads: Sequence[Head]) -> tuple[Head, ...]:
    """The heads with the scales that their outputs have over all batches.

    Values are standardised column by column, and as one where columns are many or do not vary. Several outputs are
    brought to the same size, so that distances count each alike.
    """
    bare = tuple(replace(head, mean=None, std=None, unit=1.0) for head in heads)
    sums = [_Sums() for _ in heads]
    with torch.no_grad():
        for batch in batches:
            returned = batch.forward.raw(model, batch.data)
            outputs = read_outputs(bare, returned, batch.size, batch.data)
            for part, sum_ in zip(outputs.parts, sums, strict=True):
                rows = part.rows(outputs.values).double()
                sum_.add(rows[part.weights > 0] if part.weights is not None else rows.flatten(0, 1), len(rows))
    found = []
    for head, sum_ in zip(bare, sums, strict=True):
        if head.kind == "values":
            mean, std = sum_.scale()
            head = replace(head, mean=mean, std=std)
        if len(heads) > 1:
            head = replace(head, unit=sum_.size(head) or 1.0)
        found.append(head)
    return tuple(found)


class _Sums:
    """Sums over the rows of one output, column by column."""

    def __init__(self) -> None:
        self.samples = self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor, samples: int) -> None:
        self.samples += samples
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        total, squares, count = self.total, self.squares, self.count
        if len(total) > _SCALED_APART:
            count, total, squares = count * len(total), total.sum(0, keepdim=True), squares.sum(0, keepdim=True)
        mean = total / count
        var = (squares / count - mean.square()).clamp_min(0)
        # A column that does not vary has no scale of its own: that of the others, or its size, or 1.
        floor = 1e-6 * float(var.max()) or 1e-6 * float(mean.square().max())
        var = torch.where(var > floor, var, var.mean() if float(var.max()) > 0 else mean.square())
        return mean, torch.where(var > 0, var, 1.0).sqrt()

    def size(self, head: Head) -> float:
        """Root mean square over samples of the norm of what the head makes of its rows."""
        squares = self.squares
        if head.mean is not None and head.std is not None:
            squares = (self.squares - 2 * head.mean * self.total + self.count * head.mean.square()) / head.std.square()
        return float((squares.sum() / max(self.samples, 1)).clamp_min(0).sqrt())
