"""Tiny networks with awkward traits, and dense references for them; none of it uses the package's own formulas."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacrev

DISTILL_NEEDS = frozenset({"rounding_error", "subspace", "trace", "loss_change"})


class Words(nn.Module):
    """A word table shared with the output layer, tokens in, one row of logits a token out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.table(tokens))))


class Twice(nn.Module):
    """One linear module, known under two names, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Named(nn.Module):
    """Takes two named inputs, as the entries of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(torch.tanh(self.left(a) + self.right(b)))}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def relu_mlp() -> nn.Module:
    """In-place activations, and a frozen first layer."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    return net


def cnn() -> nn.Module:
    """Batch-norm with statistics of its own, groups, stride."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    shake_batchnorm(net)
    return net


def pixels() -> nn.Module:
    """One row of logits a pixel, through a transposed convolution."""
    return nn.Sequential(nn.Conv2d(2, 4, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 2, stride=2))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def shake_batchnorm(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)


@dataclass(frozen=True)
class Case:
    """A network in float64 and eval mode with uneven batches."""

    net: nn.Module
    batches: list[Any]

    def output(self, net: Callable[[Any], Any], batch: Any) -> Tensor:
        """Rows of logits, by the shape of each case's own output."""
        found = net(**batch) if isinstance(batch, dict) else net(batch)
        found = found["logits"] if isinstance(found, dict) else found
        return found.movedim(1, -1).flatten(0, -2) if found.ndim == 4 else found.flatten(0, -2)


def _randn(*shapes: Sequence[int]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(mlp(), _randn((5, 4), (3, 4))),
    "frozen_inplace": lambda: Case(relu_mlp(), _randn((5, 4), (3, 4))),
    "cnn": lambda: Case(cnn(), _randn((3, 2, 6, 6), (2, 2, 6, 6))),
    "pixels": lambda: Case(pixels(), _randn((2, 2, 4, 4), (1, 2, 4, 4))),
    "tied": lambda: Case(Words(), [torch.randint(0, 6, (3, 4)), torch.randint(0, 6, (2, 3))]),
    "twice": lambda: Case(Twice(), _randn((4, 4), (2, 4))),
    "dict": lambda: Case(Named(), [{"b": x[:, :2], "a": x} for x in _randn((4, 3), (2, 3))]),
    "regression": lambda: Case(regressor(), _randn((5, 4), (2, 4))),
}


def make_case(name: str) -> Case:
    case = CASES[name]()
    case.net.double().eval()
    return case


def loss_of(case: Case, net: Callable[[Any], Any]) -> Tensor:
    """Mean over samples of a smooth loss that has a gradient and mixed curvature."""
    sizes = [len(next(iter(b.values())) if isinstance(b, dict) else b) for b in case.batches]
    return sum(n * task_loss(case.output(net, b)) for n, b in zip(sizes, case.batches, strict=True)) / sum(sizes)


def task_loss(rows: Tensor) -> Tensor:
    return (torch.sin(2 * rows) + 0.3 * rows.square()).mean()


class Dense:
    """The weights of some layers as one vector, with dense derivatives of what is computed from them."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.net = net
        self.keys = [f"{name}.weight" for name in names]
        self.weights = [net.get_parameter(key).detach() for key in self.keys]
        self.sizes = [w.numel() for w in self.weights]
        self.vector = torch.cat([w.flatten() for w in self.weights])

    def call(self, vector: Tensor) -> Callable[..., Any]:
        """The network with these weights, in every module that shares them."""

        def run(*args: Any, **kwargs: Any) -> Any:
            held = [self.net.get_parameter(key) for key in self.keys]
            parts = {id(w): v.reshape(w.shape) for w, v in zip(held, vector.split(self.sizes), strict=True)}
            changed = [(m, m.weight) for m in self.net.modules() if id(getattr(m, "weight", None)) in parts]
            try:
                for module, weight in changed:
                    module._parameters["weight"] = parts[id(weight)]
                return self.net(*args, **kwargs)
            finally:
                for module, weight in changed:
                    module._parameters["weight"] = weight

        return run

    def hessian(self, loss: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
        return hessian(lambda vector: loss(self.call(vector)))(self.vector).detach()

    def jacobian(self, output: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
        return jacrev(lambda vector: output(self.call(vector)))(self.vector).detach()

    def blocks(self, matrix: Tensor) -> list[Tensor]:
        """The diagonal blocks of the layers."""
        edges = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        return [matrix[a:b, a:b] for a, b in pairwise(edges)]


def gauss_newton(case: Case, dense: Dense) -> Tensor:
    """Analytic softmax Gauss–Newton matrix: Jᵀ (diag p − p pᵀ) J over a batch's rows, batches by their samples."""
    total = torch.zeros(len(dense.vector), len(dense.vector), dtype=torch.float64)
    samples = 0
    for batch in case.batches:
        size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        rows = case.output(case.net, batch).detach()
        jacobian = dense.jacobian(lambda net, batch=batch: case.output(net, batch))
        for z, j in zip(rows, jacobian, strict=True):
            p = z.softmax(0)
            inner = torch.diag(p) - torch.outer(p, p) if len(z) > 1 else torch.ones(1, 1, dtype=z.dtype)
            total += size / len(rows) * j.T @ inner @ j
        samples += size
    return total / samples


def kl(before: Tensor, after: Tensor) -> Tensor:
    """Mean KL divergence of rows of logits; half the squared distance of single columns."""
    if before.shape[1] == 1:
        return 0.5 * (after - before).square().mean()
    p, q = before.softmax(1), after.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def distill_loss(case: Case) -> Callable[[Callable[..., Any]], Tensor]:
    """The distill objective written down again, from formulas."""
    sizes = [len(next(iter(b.values())) if isinstance(b, dict) else b) for b in case.batches]
    targets = [case.output(case.net, b).detach() for b in case.batches]

    def loss(net: Callable[..., Any]) -> Tensor:
        each = [kl(t, case.output(net, b)) for t, b in zip(targets, case.batches, strict=True)]
        return sum(n * x for n, x in zip(sizes, each, strict=True)) / sum(sizes)

    return loss


def dense_operator(function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The matrix of a linear function, column by column from unit inputs of ``shape`` (without the batch axis)."""
    n = int(torch.Size(shape).numel())
    units = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    with torch.no_grad():
        return torch.stack([function(unit[None]).flatten() for unit in units], dim=1)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "stride_padding": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    "uneven": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 4), padding="same"), (2, 5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
    "replicate": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1), (4, 7)),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=1, stride=2), (2, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=2, padding=1), (2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3), (3, 4, 3)),
    "transposed_all": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
        (4, 3, 3),
    ),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=2, padding=1, bias=False), (3, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 2, 3)),
}  # fmt: skip


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 150, lr: float = 0.01) -> nn.Module:
    """The network after a short training; in train mode, as a user leaves it."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    net.train()
    for step in range(steps):
        part = torch.arange(64 * step, 64 * step + 64) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return net


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four kinds of noisy 8 × 8 stripes: vertical, horizontal and the two diagonals, at random phases."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=draws)
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([rows, cols, rows + cols, rows - cols])[y]
    phase = 6.28 * torch.rand(count, 1, 1, generator=draws)
    return (torch.sin(waves + phase) + 1.1 * torch.randn(count, 8, 8, generator=draws))[:, None], y


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 4),
    )  # fmt: skip


def image_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of images of uneven size, 96 together."""
    x, y = images(96, 1)
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def image_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def picture(net: nn.Module) -> dict[str, Any]:
    """Everything about a network, and the random states, that a visitor must leave as it was."""
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "ids": [id(p) for p in net.parameters()],
        "classes": [type(m) for m in net.modules()],
        "flags": [m.training for m in net.modules()],
        "grads": [p.requires_grad for p in net.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "attributes": [sorted(m.__dict__) for m in net.modules()],
        "rng": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
    }


def assert_same_picture(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]
    for key in before.keys() - {"state", "rng"}:
        assert before[key] == after[key], key
