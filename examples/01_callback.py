"""Quantize while you train: one callback, two networks, real digits.

Trains the MLP 784-256-10 and a small CNN with batch-norm on 4,000 MNIST images, and quantizes each when its training
ends. For each network the console shows the layers with their curvature and bits, then the float network and three
quantized ones side by side; figures and scalars go to TensorBoard. ``study=True`` is for the figures that explain more.

Run it (about a minute and a half on two CPU cores)::

    python examples/01_callback.py
    python examples/01_callback.py --network mlp --avg-bits 2.25 --method caq
    python examples/01_callback.py --data-dir ~/data --dataset FashionMNIST
    tensorboard --logdir demo_logs
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from data import Digits
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from models import Classifier

from lightning_caq import CurvatureQuantizationCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--method", default="cet")
    parser.add_argument("--avg-bits", type=float, default=2.5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--curvature-samples", type=int, default=128, help="images that curvature is measured on")
    parser.add_argument("--data-dir", help="folder with torchvision's MNIST or FashionMNIST")
    parser.add_argument("--dataset", default="MNIST", choices=["MNIST", "FashionMNIST"])
    parser.add_argument("--log-dir", default="demo_logs")
    args = parser.parse_args()

    # Lightning's lines on devices and its tips say nothing about quantization.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "caq" in record.getMessage())
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    data = Digits(args.dataset, args.data_dir)
    for network in args.network:
        print(f"\n=== {network} ===")
        seed_everything(0, verbose=False)
        quantizer = CurvatureQuantizationCallback(
            args.method,
            avg_bits=args.avg_bits,
            calibration_samples=1024,  # more than the MLP has inputs
            curvature_samples=args.curvature_samples,
            compare=("uniform", "caq"),
            monitor_every_n_epochs=2,
            study=True,
        )
        trainer = Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(args.log_dir, name=network),
            callbacks=[quantizer],
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
        )
        trainer.fit(Classifier(network), data)
    print(f"Pictures and curves: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
