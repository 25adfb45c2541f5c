"""Fine-tune at two bits: train a small CNN, quantize every layer to 2 bits, train the quantized network on.

The same callback does it all. The first ``fit`` trains the float network and quantizes it at its end; the second one
trains the quantized network through straight-through gradients and settles it on its grids again. With
``--learn-scales`` the steps of the grids are trained too (LSQ), and with ``--activation-bits`` the clips of the layers'
inputs (PACT). The accuracy of the three networks on 1,000 test images is printed.

Run it (about a minute on two CPU cores)::

    python examples/02_finetune.py
    python examples/02_finetune.py --learn-scales
    python examples/02_finetune.py --learn-scales --activation-bits 2
"""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext

from data import Digits
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from models import Classifier

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.quantizers.fake_quant.learning import learning_scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn", choices=["mlp", "cnn"])
    parser.add_argument("--bits", type=int, default=2, help="bits of every weight")
    parser.add_argument("--rounding", default="nearest", choices=["nearest", "error_feedback"])
    parser.add_argument("--activation-bits", type=int, help="bits of the layers' inputs; float32 by default")
    parser.add_argument("--learn-scales", action="store_true", help="train the steps of the grids too")
    parser.add_argument("--epochs", type=int, default=6, help="of the float network")
    parser.add_argument("--epochs-after", type=int, default=2, help="of the quantized network")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(args.seed, verbose=False)
    data, model = Digits(), Classifier(args.network)
    quantizer = CurvatureQuantizationCallback(
        "uniform",
        avg_bits=args.bits,
        bits=[args.bits],
        rounding=args.rounding,
        activation_bits=args.activation_bits,
        compare=[],
        guard=False,
        curvature_samples=64,
    )

    trainer(args.epochs, quantizer).fit(model, data)
    print(f"float        {100 * quantizer.report.metrics['float/val_acc']:.1f} %")
    print(f"{args.bits} bits       {accuracy(model, data):.1f} %, {quantizer.plan.ratio:.1f} times smaller")

    model.learning_rate = 1e-3
    with learning_scales(model) if args.learn_scales else nullcontext():
        trainer(args.epochs_after, quantizer).fit(model, data)
    after = accuracy(model, data)
    print(f"fine-tuned   {after:.1f} % after {args.epochs_after} epochs, {quantizer.plan.ratio:.1f} times smaller")


def trainer(epochs: int, quantizer: CurvatureQuantizationCallback) -> Trainer:
    """A quiet trainer on the CPU."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[quantizer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def accuracy(model: LightningModule, data: LightningDataModule) -> float:
    """Percent of the test images that are classified rightly."""
    test = Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False)
    return 100 * test.test(model, data, verbose=False)[0]["test_acc"]


if __name__ == "__main__":
    main()
