"""What the benchmarks run on: residual networks trained on CIFAR-10, and 3,000 of its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"resnet20": 3, "resnet32": 5}
DATA = Path(__file__).resolve().parents[1] / "../shared/data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out; where there are more of them, the image is halved.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grows = outputs != inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2 if self.grows else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Channels (N, inputs, H, W) to (N, outputs, H', W')."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if not self.grows:
            return x
        quarter = self.conv2.out_channels // 4
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))


class ResNet(nn.Module):
    """Residual network for images of 32 by 32: three stages of ``blocks`` blocks with 16, 32 and 64 channels.

    Args:
        blocks: Blocks a stage; 3 make a ResNet-20, 5 a ResNet-32.
        classes: Number of classes.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs), *(Block(outputs, outputs) for _ in range(blocks - 1)))


def load_network(name: str, data: Path = DATA) -> ResNet:
    """The trained network called ``name``, in eval mode.

    Args:
        name: A key of ``BLOCKS``.
        data: Folder that holds ``<name>_cifar10.th``.

    Raises:
        FileNotFoundError: If the file is not there.
    """
    state = torch.load(_existing(data / f"{name}_cifar10.th"), map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet(BLOCKS[name])
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


@dataclass(frozen=True)
class Images:
    """Normalised images (N, 3, 32, 32) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The images in their order, ``size`` at a time."""
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def sample(self, count: int, seed: int) -> Images:
        """``count`` images drawn without replacement; the same for the same seed."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.x[chosen], self.y[chosen])


def load_cifar10(data: Path = DATA) -> tuple[Images, Images]:
    """2,000 training and 1,000 test images of CIFAR-10.

    Args:
        data: Folder that holds ``cifar10_small.npz``.

    Raises:
        FileNotFoundError: If the file is not there.
    """
    with np.load(_existing(data / "cifar10_small.npz")) as file:
        return _images(file["x_train"], file["y_train"]), _images(file["x_test"], file["y_test"])


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    pixels = torch.from_numpy(x).float().div(255)
    normalised = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    return Images(normalised.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder with the benchmark's data with --data.")
    return path


def accuracy(model: nn.Module, images: Images) -> float:
    """Percentage of images whose class the model names."""
    device = next(model.parameters()).device
    with torch.no_grad():
        right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in images.batches(250))
    return 100 * right / len(images)
