"""A part: some of the numbers of a parameter, as the weight of a layer that lies inside the module that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class View:
    """Where the weight of a part lies in a parameter, steps taken in the order of these attributes.

    Attributes:
        parameter: Name of the parameter in its module.
        index: Place along the first axis, such as the number of an expert.
        rows: First row, and the one after the last.
        transposed: Whether inputs come before outputs in the parameter.
        flat: Whether all axes behind the first count as one.
        table: Whether rows are looked up rather than multiplied by.
        shared: Whether the parameter belongs to the module that holds it as much as to the part, as where it is the
            weight of another layer; then both have the one weight.
    """

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    flat: bool = False
    table: bool = False
    shared: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The part of a parameter, as a view of it.

        Example:
            >>> import torch
            >>> View("weight", rows=(1, 3), transposed=True).of(torch.arange(6).reshape(3, 2))
            tensor([[2, 4],
                    [3, 5]])
        """
        found = whole if self.index is None else whole[self.index]
        found = found if self.rows is None else found[self.rows[0] : self.rows[1]]
        found = found.mT if self.transposed else found
        return found.flatten(1) if self.flat else found


class WeightPart:
    """What parts add to the layer of torch that they are: a weight that lies in a parameter of another module.

    A part has no parameters, so the network's and the keys of its state dict stay what they are. While its weight is
    split off (``split_weights``) it has one, in the same memory.
    """

    view: View
    loaded = False  # whether the state dict that is being loaded has the parameter that the part lies in
    _parameters: dict[str, Any]

    @property
    def owner(self) -> Any:
        """The module that holds the parameter."""
        return self.__dict__["_owner"]

    @property
    def training(self) -> bool:
        """Whether its owner is in training mode."""
        return bool(self.owner.training)

    @training.setter
    def training(self, mode: bool) -> None:
        """A part has no mode of its own."""

    @property
    def whole(self) -> Tensor:
        """The parameter that the part lies in."""
        whole: Tensor = attrgetter(self.view.parameter)(self.owner)
        return whole

    @property
    def weight(self) -> Tensor:
        """The weight; gradients by it go to the parameter that it lies in."""
        given: Tensor | None = self._parameters.get("weight")
        return self.view.of(self.whole) if given is None else given

    @property
    def applied_weight(self) -> Tensor:
        """What inputs are multiplied by."""
        return self.weight

    @property
    def is_split(self) -> bool:
        """Whether the part holds a parameter of its own."""
        return "weight" in self._parameters

    @property
    def rounds_input(self) -> bool:
        """Whether the part does something to its input before it multiplies."""
        return False

    @property
    def watched(self) -> bool:
        """Whether its calls matter, not only its weight."""
        this: Any = self
        return self.rounds_input or bool(this._forward_hooks or this._forward_pre_hooks)

    def _lies_in(self, owner: nn.Module, view: View) -> None:
        self.__dict__["_owner"] = owner  # not a child: it is the other way round
        self.view = view


class LinearPart(WeightPart, nn.Linear):  # type: ignore[override]
    """A part that is multiplied by; the module that holds it adds the bias."""

    def __init__(self, owner: nn.Module, view: View) -> None:
        nn.Module.__init__(self)
        self._lies_in(owner, view)
        self.register_parameter("bias", None)
        self.out_features, self.in_features = self.weight.shape


class TablePart(WeightPart, nn.Embedding):  # type: ignore[override]
    """A part whose rows are looked up."""

    def __init__(self, owner: Any, view: View) -> None:
        nn.Module.__init__(self)
        self._lies_in(owner, view)
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.padding_idx = getattr(owner, "padding_idx", None)
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False


def make_part(owner: nn.Module, view: View) -> nn.Module:
    """The part of a parameter of a module.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> part = make_part(attention, View("in_proj_weight", rows=(4, 8)))
        >>> part, list(part.parameters())
        (LinearPart(in_features=4, out_features=4, bias=False), [])
    """
    return TablePart(owner, view) if view.table else LinearPart(owner, view)


def parts_of(module: nn.Module) -> list[WeightPart]:
    """The parts that a module has.

    Example:
        >>> parts_of(nn.Linear(2, 1))
        []
    """
    return [part for part in module.children() if isinstance(part, WeightPart)]


def held_weight(module: Any) -> Tensor | None:
    """The weight that a module holds as a parameter, or as a part of one; ``None`` where it has none or computes it.

    Example:
        >>> held_weight(nn.Linear(2, 1)).shape, held_weight(nn.ReLU())
        (torch.Size([1, 2]), None)
    """
    if isinstance(module, WeightPart):
        return module.weight
    weight: Tensor | None = module._parameters.get("weight")
    return weight


def weight_identity(module: Any) -> Any:
    """What tells weights apart: two modules share their weight where it is the same for both.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weight_identity(layer) == id(layer.weight)
        True
    """
    if isinstance(module, WeightPart) and not module.is_split:
        return id(module.whole) if module.view.shared else (id(module.whole), module.view)
    return id(module.weight)
