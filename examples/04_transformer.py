"""Fine-tune a small BERT on text and quantize it when its training ends.

Tells docstrings of Python's own library apart by their package. The network is a BERT of two layers that starts from
random numbers, or one of yours, read from a folder. The callback quantizes it; the console shows the accuracy of the
float and of the quantized network.

Run it (about two minutes on two CPU cores)::

    python examples/04_transformer.py
    python examples/04_transformer.py --avg-bits 2.5 --epochs 6
    python examples/04_transformer.py --model-dir ~/models/minilm
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from text import PACKAGES, Docstrings
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lightning_caq import CurvatureQuantizationCallback


class TextClassifier(LightningModule):
    """A sequence classifier of transformers; labels are in its batches."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.accuracy = MulticlassAccuracy(len(PACKAGES), average="micro")

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_loss", output.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def small_bert(words: int, length: int) -> nn.Module:
    """A BERT of two layers that knows nothing yet."""
    config = BertConfig(
        vocab_size=words,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=length,
        num_labels=len(PACKAGES),
    )
    return BertForSequenceClassification(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", help="folder with a model and a tokenizer of transformers, to start from")
    parser.add_argument("--avg-bits", type=float, default=2.5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--length", type=int, default=48, help="words of a text")
    parser.add_argument("--log-dir", default="demo_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    if args.model_dir:
        data = Docstrings(AutoTokenizer.from_pretrained(args.model_dir), args.length)
        net = AutoModelForSequenceClassification.from_pretrained(args.model_dir, num_labels=len(PACKAGES))
    else:
        data = Docstrings(length=args.length)
        net = small_bert(data.tokenizer.size, args.length)
    quantizer = CurvatureQuantizationCallback(
        avg_bits=args.avg_bits, calibration_samples=512, curvature_samples=64, compare=("uniform",)
    )
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[quantizer],
        default_root_dir=args.log_dir,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    trainer.fit(TextClassifier(net, lr=5e-5 if args.model_dir else 1e-3), data)


if __name__ == "__main__":
    main()
