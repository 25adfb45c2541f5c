"""Small networks for the benchmarks, trained on 10,000 images of MNIST in under a minute each.

The proposal names MLP-2 on MNIST, MLP-4 on Fashion-MNIST and CNN-4 on CIFAR-10. All three run on MNIST here: of
Fashion-MNIST there are no images at hand, and of CIFAR-10 only 2,000, too few to train a network on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from networks import DATA, Images, _existing
from torch import nn

CACHE = Path(__file__).resolve().parents[1] / "build/small_networks"
MEAN, STD = 0.1307, 0.3081
EPOCHS, BATCH, RATE, SEED = 6, 100, 2e-3, 0


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them, for flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn4() -> nn.Module:
    """Four convolutions with batch-norm and two poolings between them, then a linear layer."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise((1, 16, 16, 32, 32))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "mlp2": lambda: mlp(784, 256, 10),
    "mlp4": lambda: mlp(784, 512, 256, 128, 10),
    "cnn4": cnn4,
}


def load_small(name: str, data: Path = DATA, cache: Path = CACHE) -> tuple[nn.Module, Images, Images]:
    """The trained network called ``name`` in eval mode, with the images it was trained on and others to test it.

    It is trained on the first call and then kept in ``cache``; delete the file there to train it again.

    Args:
        name: A key of ``SMALL``.
        data: Folder that holds ``mnist_20k.npz``.
        cache: Folder for the trained weights.

    Raises:
        FileNotFoundError: If the images are not there.
    """
    train, test = load_mnist(data)
    file = cache / f"{name}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SMALL[name]()
        if file.is_file():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            _train(model, train)
            cache.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")  # two processes may train at the same time
            torch.save(model.state_dict(), part)
            part.replace(file)
    return model.eval(), train, test


def load_mnist(data: Path = DATA) -> tuple[Images, Images]:
    """10,000 training and 10,000 test images of MNIST, (N, 1, 28, 28).

    Args:
        data: Folder that holds ``mnist_20k.npz``.

    Raises:
        FileNotFoundError: If the file is not there.
    """
    with np.load(_existing(data / "mnist_20k.npz")) as file:
        return _images(file["x_train"], file["y_train"]), _images(file["x_test"], file["y_test"])


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    pixels = torch.from_numpy(x).float().div(255).permute(0, 3, 1, 2).contiguous()
    return Images((pixels - MEAN) / STD, torch.from_numpy(y).long())


def _train(model: nn.Module, images: Images) -> None:
    """Adam with a rate that falls linearly to zero; the order of the images comes from the global seed."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images.x[chosen]), images.y[chosen]).backward()
            optimizer.step()
            schedule.step()
