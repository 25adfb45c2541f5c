"""Two networks whose layers are unlike each other, trained on 2,000 images: a MobileNet-like one, a transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import Images
from torch import Tensor, nn

EPOCHS = 20
_BATCH = 100


class MobileNet(nn.Module):
    """Inverted residuals: 1 by 1 convolutions that widen, 3 by 3 ones channel by channel, 1 by 1 ones that narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 16, 3, stride=2)
        widths = ((16, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1))
        self.blocks = nn.ModuleList([_Inverted(*width) for width in widths])
        self.head = _convolution(48, 128, 1)
        self.classes = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classes(self.head(x).mean(dim=(2, 3)))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.widen = _convolution(inputs, wide, 1)
        self.spatial = _convolution(wide, wide, 3, stride=stride, groups=wide)
        self.narrow = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.spatial(self.widen(x)))
        return x + y if self.adds else y


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class Transformer(nn.Module):
    """Four layers of attention over the 64 patches of an image, of 4 by 4 pixels each."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers = nn.ModuleList([_Attention(width, heads=4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.classes(self.norm(x).mean(1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


UNLIKE: dict[str, Callable[[], nn.Module]] = {"mobilenet": MobileNet, "transformer": Transformer}


def trained(name: str, images: Images, epochs: int = EPOCHS) -> nn.Module:
    """A network trained on images, mirrored at random, in eval mode; the same for the same images and machine.

    Args:
        name: A key of ``UNLIKE``.
        images: The images.
        epochs: How often each is seen.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNLIKE[name]()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
        batches = -(-len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(_BATCH):
                x, y = images.x[chosen], images.y[chosen]
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
                optimizer.step()
                schedule.step()
    return model.eval()
