"""What other libraries make of the same Hessian: each is here if it is installed (``pip install -e .[bench]``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import weights_of
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        package: What pip calls it.
        module: What Python calls it.
        product: Model and batches of images and soft targets to v ↦ H v, as the library does it when asked plainly.
        layer_products: The same for the products with every layer's own block, if it offers them.
        eigenvalues: Model, one batch and k to the top k eigenvalues and the products they took, by its defaults, if
            it offers them.
    """

    package: str
    module: str
    product: Callable[[nn.Module, Batches], Product]
    layer_products: Callable[[nn.Module, Batches], Product] | None = None
    eigenvalues: Callable[[nn.Module, tuple[Tensor, Tensor], int], tuple[Tensor, int]] | None = None

    @property
    def version(self) -> str:
        """The version installed."""
        return importlib.metadata.version(self.package)


def installed() -> list[Peer]:
    """The libraries that are here."""
    return [peer for peer in _PEERS if importlib.util.find_spec(peer.module) is not None]


def _pyhessian(model: nn.Module, batches: Batches) -> Any:
    import pyhessian

    with warnings.catch_warnings():  # it calls backward(create_graph=True), which torch warns of
        warnings.simplefilter("ignore", UserWarning)
        # One batch is the case in which it keeps the graph from one product to the next.
        data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": list(batches)}
        operator = pyhessian.hessian(model, nn.CrossEntropyLoss(), cuda=False, **data)
    model.zero_grad()
    return operator


def _pyhessian_product(model: nn.Module, batches: Batches) -> Product:
    from pyhessian.utils import hessian_vector_product

    operator = _pyhessian(model, batches)

    def product(v: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if len(batches) == 1:
                return _flat(hessian_vector_product(operator.gradsH, operator.params, _parts(model, v)))
            operator.params = weights_of(model)
            return _flat(operator.dataloader_hv_product(_parts(model, v))[1])

    return product


def _pyhessian_eigenvalues(model: nn.Module, batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, int]:
    operator = _pyhessian(model, [batch])
    module = sys.modules[type(operator).__module__]
    plain, calls = module.hessian_vector_product, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args)

    module.hessian_vector_product = counted
    try:
        torch.manual_seed(0)
        values, _ = operator.eigenvalues(top_n=k)
    finally:
        module.hessian_vector_product = plain
    return torch.tensor(values, dtype=torch.float64), calls


def _curvlinops(model: nn.Module, batches: Batches, **options: Any) -> Product:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), weights_of(model), list(batches), check_deterministic=False, **options
    )
    return lambda v: operator @ v


def _curvlinops_blocks(model: nn.Module, batches: Batches) -> Product:
    return _curvlinops(model, batches, block_sizes=[1] * len(weights_of(model)))


def _eigenthings(model: nn.Module, batches: Batches) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(model, list(batches), supervised_loss(nn.CrossEntropyLoss()))


def _eigenthings_product(model: nn.Module, batches: Batches) -> Product:
    product: Product = _eigenthings(model, batches).matvec
    return product


def _eigenthings_eigenvalues(model: nn.Module, batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, int]:
    from hessian_eigenthings import lanczos

    result = lanczos(_eigenthings(model, [batch]), k=k, seed=0)
    return result.eigenvalues.double(), result.iterations


def _parts(model: nn.Module, vector: Tensor) -> list[Tensor]:
    weights = weights_of(model)
    return [v.reshape(w.shape) for v, w in zip(vector.split([w.numel() for w in weights]), weights, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


_PEERS = (
    Peer("PyHessian", "pyhessian", _pyhessian_product, eigenvalues=_pyhessian_eigenvalues),
    Peer("curvlinops-for-pytorch", "curvlinops", _curvlinops, layer_products=_curvlinops_blocks),
    Peer("hessian-eigenthings", "hessian_eigenthings", _eigenthings_product, eigenvalues=_eigenthings_eigenvalues),
)
