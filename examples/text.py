"""Real text without a download: the docstrings of Python's own library, to be told apart by their package."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

PACKAGES = ("asyncio", "email", "logging", "multiprocessing", "unittest", "xml", "importlib", "concurrent")
PAD, UNKNOWN, FIRST = 0, 1, 2  # the first position, by which BERT classifies


def docstrings() -> tuple[list[str], list[int]]:
    """Every docstring of some packages, and the number of its package, in random order."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for label, package in enumerate(PACKAGES):
        for path in sorted((library / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node)
                    if text and len(text) > 30:
                        found[text] = label
    texts = sorted(found)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order], [found[texts[i]] for i in order]


class Words:
    """Words as numbers, the most frequent ones; the interface of a tokenizer of transformers, as far as it is used."""

    def __init__(self, texts: list[str], size: int = 2000) -> None:
        counts = Counter(word for text in texts for word in self._words(text))
        self._numbers = {word: i + 3 for i, (word, _) in enumerate(counts.most_common(size - 3))}
        self.size = size

    def __call__(self, texts: list[str], max_length: int, **options: object) -> dict[str, Tensor]:
        rows = [[FIRST, *(self._numbers.get(w, UNKNOWN) for w in self._words(text))][:max_length] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


class Docstrings(LightningDataModule):
    """Docstrings and their packages, an eighth of them to test on.

    Args:
        tokenizer: Turns texts into ``input_ids`` and ``attention_mask``; by default the words of the texts.
        length: Words a text.
        batch_size: Texts a batch.
    """

    def __init__(self, tokenizer: object = None, length: int = 48, batch_size: int = 64) -> None:
        super().__init__()
        texts, labels = docstrings()
        self.tests = len(texts) // 8
        self.tokenizer = tokenizer or Words(texts[self.tests :])
        self.rows, self.length, self.batch_size = list(zip(texts, labels, strict=True)), length, batch_size

    def _batch(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*rows, strict=True)
        options = {"max_length": self.length, "truncation": True, "padding": True, "return_tensors": "pt"}
        return {**self.tokenizer(list(texts), **options), "labels": torch.tensor(labels)}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[self.tests :], self.batch_size, shuffle=True, collate_fn=self._batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[: self.tests], 128, collate_fn=self._batch)
