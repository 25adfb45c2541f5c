"""What quantization costs on networks of every size: times in gradients over the calibration samples, and memory.

Weights are random, with batch-norm statistics of the inputs and outputs spread as those of a trained network; inputs
are smooth random images or random words. Each network runs in a process and a thread of its own. Times are those of the
processor, which other work on the machine changes little, and peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from stopwatch import machine
from torch import Tensor, nn

from lightning_caq.pipeline import quantize

IMAGES, TEXTS = (256, 128), 128  # samples to calibrate on, and of these to measure curvature on
BATCH, TOKENS = 16, 128
SPREAD = 3.0  # standard deviation of logits, as in trained classifiers


@dataclass(frozen=True)
class Case:
    """A network to quantize.

    Attributes:
        make: Makes the network, with a number of classes or words.
        classes: Classes or words.
        pixels: Height and width of images; 0 where inputs are words.
    """

    make: Callable[[int], nn.Module]
    classes: int = 1000
    pixels: int = 224


@dataclass(frozen=True)
class Row:
    """What one network took.

    Attributes:
        model: Its name.
        gradients: Time of the whole pipeline in gradients over its calibration samples.
        seconds: Processor time of the whole pipeline.
        estimate_seconds: Time that was announced.
        peak_mb: Peak memory of the process, the network and the samples included.
        layers: Number of quantized layers.
        weights: Number of their weights.
        classes: Classes or words.
        samples: Samples to calibrate on.
        curvature_samples: How many of these curvature was measured on.
        gradient_seconds: Time of one gradient over the calibration samples.
        steps: Seconds of each step.
    """

    model: str
    gradients: float
    seconds: float
    estimate_seconds: float
    peak_mb: float
    layers: int
    weights: int
    classes: int
    samples: int
    curvature_samples: int
    gradient_seconds: float
    steps: dict[str, float]


def _vision(name: str) -> Callable[[int], nn.Module]:
    def make(classes: int) -> nn.Module:
        import torchvision

        network: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=classes)
        return network

    return make


def _bert(classes: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_labels=classes, attn_implementation="eager")
    network: nn.Module = BertForSequenceClassification(config)
    return network


def _llama(words: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    network: nn.Module = LlamaForCausalLM(config)
    return network


CASES = {
    **{name: Case(_vision(name)) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")},
    "vit_b_16": Case(_vision("vit_b_16")),
    "bert_base": Case(_bert, classes=4, pixels=0),
    "llama_60m": Case(_llama, classes=32_000, pixels=0),
}
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16", "bert_base", "llama_60m")


def images(count: int, pixels: int, seed: int = 0) -> Tensor:
    """Random images with structure at several scales, of unit variance, shape (count, 3, pixels, pixels)."""
    draws = torch.Generator().manual_seed(seed)
    scales = [max(pixels // part, 1) for part in (56, 16, 4)]
    layers = [F.interpolate(torch.randn(count, 3, s, s, generator=draws), size=pixels, mode="bilinear") for s in scales]
    return torch.stack(layers).sum(0) / 1.7


def words(count: int, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Random words, common ones more often, as a batch of a language model."""
    draws = torch.Generator().manual_seed(seed)
    ranks = (torch.rand(count, TOKENS, generator=draws) * torch.tensor(float(vocabulary)).log()).exp().long() - 1
    return {"input_ids": ranks.clamp(0, vocabulary - 1), "attention_mask": torch.ones(count, TOKENS, dtype=torch.long)}


def batches(case: Case, network: nn.Module, samples: int, seed: int = 0) -> list[Any]:
    """Calibration batches."""
    if case.pixels:
        return list(images(samples, case.pixels, seed).split(BATCH))
    vocabulary = network.config.vocab_size  # type: ignore[union-attr]
    whole = words(samples, int(vocabulary), seed)
    return [{key: x[i : i + BATCH] for key, x in whole.items()} for i in range(0, samples, BATCH)]


def logits(network: nn.Module, batch: Any) -> Tensor:
    """The network's logits, shape (…, classes)."""
    output = network(**batch) if isinstance(batch, dict) else network(batch)
    return output if isinstance(output, Tensor) else output.logits


def make_network(case: Case) -> nn.Module:
    """The network in eval mode, its batch-norms calibrated and its logits spread."""
    torch.manual_seed(0)
    network = case.make(case.classes)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    network.train()
    with torch.no_grad():
        if case.pixels:
            logits(network, batches(case, network, BATCH, seed=1)[0])
        network.eval()
        spread = float(logits(network, batches(case, network, BATCH, seed=2)[0]).flatten(0, -2).std(0).mean())
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(SPREAD / spread)
    return network


def gradient_seconds(network: nn.Module, data: list[Any], parts: int = 2) -> float:
    """Time of one gradient over all samples, judged by the second pass over a few batches."""
    parameters, few = [p for p in network.parameters() if p.requires_grad], data[:parts]
    for _ in range(2):
        start = time.process_time()
        for batch in few:
            torch.autograd.grad(logits(network, batch).logsumexp(-1).sum(), parameters, allow_unused=True)
        seconds = time.process_time() - start
    return seconds * len(data) / len(few)


def measure(name: str, case: Case, samples: int, curvature_samples: int, say: Callable[[str], None]) -> Row:
    """Quantize a network with the default options and four bits on average."""
    torch.set_num_threads(1)
    network = make_network(case)
    data = batches(case, network, samples)
    announced: list[str] = []

    def heard(line: str) -> None:
        announced.append(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say(f"{time.process_time() - start:8.1f} s {peak:7.0f} MB  {line}")

    before = gradient_seconds(network, data)
    start = time.process_time()
    result = quantize(
        network, data, avg_bits=4, calibration_samples=samples, curvature_samples=curvature_samples, say=heard
    )
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers = result.plan.layers
    return Row(
        model=name,
        gradients=seconds / before,
        seconds=seconds,
        estimate_seconds=_announced(announced),
        peak_mb=peak,
        layers=len(layers),
        weights=sum(plan.codes.numel() for plan in layers),
        classes=case.classes,
        samples=samples,
        curvature_samples=curvature_samples,
        gradient_seconds=before,
        steps={name: round(x, 2) for name, x in result.report.seconds.items()},
    )


def _announced(lines: list[str]) -> float:
    """Seconds of all estimates that were announced."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    found = [re.search(r"about ([\d.]+) (s|min|h)\b", line) for line in lines]
    return sum(float(match[1]) * units[match[2]] for match in found if match)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = "| network | weights | layers | classes | samples | gradients | seconds | announced | peak MB |"
    lines = [head, "| --- " + "| ---: " * 8 + "|"]
    lines += [
        f"| {r.model} | {r.weights:,} | {r.layers} | {r.classes:,} | {r.samples} / {r.curvature_samples} | "
        f"{r.gradients:.1f} | {r.seconds:.0f} | {r.estimate_seconds:.0f} | {r.peak_mb:,.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def in_own_process(arguments: list[str]) -> Row:
    """Measure one network in a process of its own."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CASES), nargs="+", help="all of the table by default")
    parser.add_argument("--classes", type=int, help="classes or words, those of the network by default")
    parser.add_argument("--pixels", type=int, help="height and width of images, 224 by default")
    parser.add_argument("--samples", type=int, help="samples to calibrate on, 256 images or 128 texts by default")
    parser.add_argument("--curvature-samples", type=int, help="samples to measure curvature on, 128 by default")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = []
    for name in options.model or MODELS:
        case = CASES[name]
        case = Case(case.make, options.classes or case.classes, (options.pixels or case.pixels) if case.pixels else 0)
        whole, few = IMAGES if case.pixels else (TEXTS, TEXTS)
        samples = options.samples or whole
        curvature = min(options.curvature_samples or few, samples)
        if options.child:
            row = measure(name, case, samples, curvature, lambda line: print(line, file=sys.stderr, flush=True))
            print(json.dumps(asdict(row)))
            return
        sizes = {"classes": case.classes, "pixels": case.pixels, "samples": samples, "curvature-samples": curvature}
        rows.append(in_own_process(["--model", name, *(f"--{key}={x}" for key, x in sizes.items())]))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(table(rows))
    print(f"\nMachine: {machine()}\nCommand: python benchmarks/size.py {' '.join(arguments or sys.argv[1:])}")


if __name__ == "__main__":
    main()
