"""A language model of characters, trained on the reference texts that Python ships for its ``help()``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 128  # characters of a sample


class CharacterModel(nn.Module):
    """A causal transformer, whose table of characters is its last layer too.

    Args:
        characters: Size of the alphabet.
        width: Numbers a position.
        depth: Layers.
        heads: Heads of attention.
    """

    def __init__(self, characters: int, width: int = 192, depth: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, characters, bias=False)
        self.scores.weight = self.characters.weight
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = 0.02 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(weight, std=scale)

    def forward(self, text: Tensor) -> Tensor:
        """Characters (N, length) to scores of the next ones (N, length, characters)."""
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for layer in self.layers:
            x = layer(x)
        return self.scores(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True)
class Text:
    """Samples of ``LENGTH`` + 1 characters, as numbers.

    Attributes:
        train: To train on and to calibrate with, shape (samples, LENGTH + 1).
        test: To judge by.
        characters: Size of the alphabet.
    """

    train: Tensor
    test: Tensor
    characters: int


def shipped_text() -> Text:
    """The texts of Python's ``help()`` in the order of their titles, every tenth sample for testing."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[title] for title in sorted(topics))
    alphabet = sorted(set(text))
    by_character = {character: number for number, character in enumerate(alphabet)}
    coded = torch.tensor([by_character[c] for c in text])
    samples = coded[: len(coded) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    chosen = torch.arange(len(samples)) % 10 == 9
    return Text(samples[~chosen], samples[chosen], len(alphabet))


def trained_model(text: Text, *, steps: int, device: str, seed: int = 0) -> CharacterModel:
    """A model trained on a text, in eval mode; the same for the same text, steps and machine."""
    torch.manual_seed(seed)
    model = CharacterModel(text.characters).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draws, stream = torch.Generator().manual_seed(seed), text.train.flatten()
    for _ in range(steps):
        starts = torch.randint(len(stream) - LENGTH, (32, 1), generator=draws)
        batch = stream[starts + torch.arange(LENGTH + 1)].to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def log_probabilities(model: nn.Module, samples: Tensor, device: str) -> Tensor:
    """Logarithms of what a model says of every next character, shape (samples · LENGTH, characters)."""
    with torch.no_grad():
        parts = [model(part[:, :-1].to(device)).log_softmax(-1).flatten(0, 1).cpu() for part in samples.split(64)]
    return torch.cat(parts)


def perplexity(log: Tensor, samples: Tensor) -> float:
    """Exp of the mean of −ln p of the next character."""
    return math.exp(F.nll_loss(log, samples[:, 1:].flatten()).item())


def calibration(samples: Tensor, count: int, seed: int, device: str) -> Sequence[Tensor]:
    """Batches of inputs drawn at random."""
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
    return [part.to(device) for part in samples[chosen, :-1].split(32)]
