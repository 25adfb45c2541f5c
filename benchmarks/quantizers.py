"""All quantizers and ranges on one trained network: squared error, storage, accuracy; no retraining.

Every layer gets the same bits. The error is that of rounding to the nearest values, relative to the squared weights,
over all layers; the first accuracy is that of the network with these weights and nothing else changed. The ratio counts
codes and all that the values are made of. The second accuracy is that of ``quantize``: with error feedback and repair.

Run it (three minutes on two idle cores; needs the data folder that benchmarks/small_networks.py describes)::

    python benchmarks/quantizers.py --network cnn4 --bits 2 3 4
    python benchmarks/quantizers.py --network cnn4 --bits 2 3 4 --json
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from networks import DATA, Images
from small_networks import SMALL, load_small
from torch import nn

from lightning_caq import quantize
from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.quantizers.grids.ranges import RANGES
from lightning_caq.quantizers.grids.values import QUANTIZERS, Quantizer

SAMPLES, BATCH = 512, 128
COLUMNS = {"squared_error": ".4f", "accuracy_nearest": ".1f"}


def choices() -> dict[str, Quantizer]:
    """What is compared, by the name it has in the table."""
    ranges = {f"affine, {name}": Quantizer(range=name) for name in RANGES}
    symmetries = {f"affine, mse, {name}": Quantizer(symmetry=name) for name in ("symmetric", "mid_rise")}
    return {**ranges, **symmetries, **{name: Quantizer(name) for name in QUANTIZERS if name != "affine"}}


def rounded(model: nn.Module, quantizer: Quantizer, bits: int, batches: list[torch.Tensor]) -> tuple[nn.Module, float]:
    """A copy with every weight at its nearest value, and Σ (Q(w) − w)² / Σ w² over all layers."""
    model = copy.deepcopy(model)
    error = total = 0.0
    for layer in find_layers(model, batches[0]):
        weight = layer_weight(model, layer).detach()
        nearest = quantizer.fit(weight, bits, layer.channel_shape).nearest(weight)
        error += float((nearest - weight).double().square().sum())
        total += float(weight.double().square().sum())
        weight.copy_(nearest)
    return model, error / total


def accuracy(model: nn.Module, images: Images) -> float:
    """Percent of the images that are classified rightly."""
    with torch.no_grad():
        right = sum(
            int((model(images.x[i]).argmax(1) == images.y[i]).sum()) for i in torch.arange(len(images)).split(500)
        )
    return 100 * right / len(images)


def rows(network: str, widths: list[int], data: Path) -> list[dict[str, Any]]:
    """One row a quantizer and bit-width."""
    model, train, test = load_small(network, data)
    batches = list(train.x[:SAMPLES].split(BATCH))
    found: list[dict[str, Any]] = [{"quantizer": "float", "bits": 32, "accuracy": accuracy(model, test)}]
    for bits in widths:
        for name, chosen in choices().items():
            result = quantize(
                model,
                batches,
                method="uniform",
                avg_bits=bits,
                bits=(bits,),
                quantizer=chosen.name,
                range=chosen.range,
                symmetry=chosen.symmetry,
                compare=(),
                guard=False,
                inplace=False,
            )
            row: dict[str, Any] = {"quantizer": name, "bits": bits}
            if chosen.range != "curvature":  # its range rests on the inputs of the layers
                plain, row["squared_error"] = rounded(model, chosen, bits, batches)
                row["accuracy_nearest"] = accuracy(plain, test)
            found.append(
                row
                | {
                    "ratio": result.plan.ratio,
                    "bytes": result.plan.bytes,
                    "accuracy": accuracy(result.model, test),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn4", choices=list(SMALL))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    found = rows(args.network, args.bits, args.data)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("| quantizer | bits | squared error | accuracy, nearest | ratio | accuracy |\n|" + " --- |" * 6)
    for row in found:
        error, nearest = (f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.items())
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else "1x"
        print(f"| {row['quantizer']} | {row['bits']} | {error} | {nearest} | {ratio} | {row['accuracy']:.1f} |")


if __name__ == "__main__":
    main()
