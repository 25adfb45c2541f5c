"""Uses: weights that functions multiply by, outside of the module that holds them or held by no layer at all.

``F.linear(x, self.qkv.weight)``, ``x @ self.tokens.weight.T`` and ``x @ self.proj`` do not call a layer. They are seen
while a batch runs; each gets a part in the module whose ``forward`` does it, by which it is a layer from then on. The
part's name says what it stands for, so that a network can be expanded again without a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_caq.network.parts.kind import Kind
from lightning_caq.network.parts.part import View, parts_of

LINEAR, MATMUL = "_linear", "_matmul"  # outputs before inputs in the parameter, or behind them
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_PROPERTIES: list[Any] = [Tensor.T, Tensor.mT]
_TRANSPOSE = {torch.t, Tensor.t, torch.transpose, Tensor.transpose, *(x.__get__ for x in _PROPERTIES)}


def use_name(parameter: str, *, transposed: bool) -> str:
    """Name of the part for a use of a parameter.

    Example:
        >>> use_name("qkv.weight", transposed=False)
        'qkv_weight_linear'
    """
    return parameter.replace(".", "_") + (MATMUL if transposed else LINEAR)


def named_uses(module: nn.Module, names: Collection[str]) -> dict[str, View]:
    """The parts that names of a module's children stand for, if they are of uses.

    Args:
        module: The module.
        names: The names; others than of uses are left out.

    Example:
        >>> named_uses(nn.Sequential(nn.Linear(2, 2)), ["0", "0_weight_linear"])
        {'0_weight_linear': View(parameter='0.weight', ..., shared=True)}
    """
    wanted = {name for name in names if name.endswith((LINEAR, MATMUL))}
    found = {}
    for parameter in [name for name, _ in module.named_parameters(remove_duplicate=False)] if wanted else ():
        for transposed in (False, True) if "." not in parameter else (False,):
            name = use_name(parameter, transposed=transposed)
            if name in wanted:
                found[name] = View(parameter, transposed=transposed, shared=not transposed)
    return found


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias of a product; ``None`` for another operator."""
    if func is F.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return given["input"], given["weight"], given.get("bias")
    if func in _MATMUL and len(args) == 2:
        return args[0], args[1], None
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return args[1], args[2], args[0]
    return None


def _transposes(func: Any, args: tuple[Any, ...]) -> bool:
    return func in _TRANSPOSE and args[0].ndim == 2 and (len(args) == 1 or {x % 2 for x in args[1:3]} == {0, 1})


_OF = "_lightning_caq_of"  # what the transpose of a weight is marked with


def _weight_of(operand: Tensor, func: Any) -> tuple[Any, bool]:
    """The weight that an operand is, or is the transpose of, and whether its inputs come before its outputs."""
    transposed = func is not F.linear
    of = getattr(operand, _OF, None)
    return (operand, transposed) if of is None else (of, not transposed)


def _route(module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = parts_of(module)
    if _transposes(func, args) and any(args[0] is part.whole for part in parts):
        result = func(*args, **kwargs)
        setattr(result, _OF, args[0])
        return result
    product = _product(func, args, kwargs)
    if product is None or not isinstance(product[1], Tensor):
        return NotImplemented
    inputs, operand, bias = product
    weight, transposed = _weight_of(operand, func)
    for part in parts:
        if part.whole is weight and part.view.transposed == transposed:
            output = part(inputs)  # type: ignore[operator]
            return output if bias is None else output + bias
    return NotImplemented


USES = Kind(name="uses", covers=lambda module: False, views=lambda module: {}, route=_route)


def find_uses(model: nn.Module, run: Any, owned: Collection[int]) -> dict[nn.Module, dict[str, View]]:
    """The uses of weights by functions that a pass shows.

    Args:
        model: The network.
        run: Runs the pass.
        owned: Identities of the modules whose own products are layers already.

    Returns:
        Module to the parts that it needs.
    """
    observed = _Observation()
    with observed.modules(model), observed, torch.no_grad():
        run()
    ways: dict[int, set[bool]] = {}
    for _, weight, transposed in observed.products:
        ways.setdefault(id(weight), set()).add(transposed)
    uses: dict[nn.Module, dict[str, View]] = {}
    for module, weight, transposed in observed.products:
        if id(module) in owned:
            continue
        parameter = next((name for name, p in module.named_parameters() if p is weight), None)
        # What is held elsewhere, or used in two ways, can be one weight only where all multiply by it alike.
        alone = parameter is not None and "." not in parameter and len(ways[id(weight)]) == 1
        if parameter is not None and (alone or not transposed):
            view = View(parameter, transposed=transposed, shared=not transposed)
            uses.setdefault(module, {})[use_name(parameter, transposed=transposed)] = view
    return uses


class _Observation(TorchFunctionMode):
    """While it is entered, products with parameters are noted, each with the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[nn.Module] = []
        self.products: list[tuple[nn.Module, Tensor, bool]] = []

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """While open, it is known which module is running."""
        with ExitStack() as stack:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    handle = module.register_forward_pre_hook(lambda module, args: self._running.append(module))
                    stack.callback(handle.remove)
                    handle = module.register_forward_hook(lambda *args: self._leave(), always_call=True)
                    stack.callback(handle.remove)
            yield

    def _leave(self) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _transposes(func, args) and isinstance(args[0], nn.Parameter):
            setattr(result, _OF, args[0])
        product = _product(func, args, kwargs)
        if product is not None and isinstance(product[1], Tensor) and self._running:
            weight, transposed = _weight_of(product[1], func)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2:
                self.products.append((self._running[-1], weight, transposed))
        return result
