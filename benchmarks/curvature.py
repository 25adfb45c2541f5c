"""What curvature costs, in gradients over the same samples, and how exact it is; beside other libraries.

python benchmarks/curvature.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers
import torch
from curvature_table import TOLERANCE, Report, Sizes, as_text
from networks import DATA, ResNet, load_cifar10, load_network
from reference import Reference, gradient, relative_errors
from stopwatch import by_turns, ratios
from torch import Tensor, nn

from lightning_caq.errors import CAQError
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.folding import batchnorm_folded
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.lanczos import Eigenpairs, lanczos
from lightning_caq.measures.measure import measure
from lightning_caq.network.layers import Layer, find_layers, layer_weight
from lightning_caq.network.objective import make_objective

EXACT = 1e-5  # the same where float32 and not the tolerance shall limit the error
LEAD = 10  # eigenvalues that are compared with those in float64
GRAPH_MEMORY = 2**36  # more than any graph here takes: all are kept
RECORDED = 256  # products of the longest Lanczos run that shorter ones take over


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    # Raised inside torch, by a peer's first forward-mode derivative.
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = Sizes(tuple(args.batches), args.samples, args.gram_samples, tuple(sorted(args.eigenpairs)), args.rounds)
    start = time.perf_counter()
    try:
        train, _ = load_cifar10(args.data)
        model = load_network("resnet20", args.data)
        report = benchmark(model, train.sample(len(train), 0).x, sizes)
    except (CAQError, OSError, ValueError) as error:
        sys.exit(f"curvature.py: {error}")
    if args.json:
        print(json.dumps(asdict(report.figures), indent=1))
    else:
        print(as_text(report, sizes, time.perf_counter() - start))


def parser() -> argparse.ArgumentParser:
    default = Sizes()
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--batches", type=int, nargs="+", default=default.batches, help="batches to time products on")
    result.add_argument("--samples", type=int, default=default.samples, help="images for Lanczos and float64")
    result.add_argument("--gram-samples", type=int, default=default.gram_samples, help="images for the Gram spectrum")
    result.add_argument("--eigenpairs", type=int, nargs="+", default=default.eigenpairs, help="eigenvalues wanted")
    result.add_argument("--rounds", type=int, default=default.rounds, help="rounds that a median is taken over")
    result.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    result.add_argument("--data", type=Path, default=DATA, help="folder with the trained network and the images")
    result.add_argument("--json", action="store_true", help="print one object instead of tables")
    return result


def benchmark(model: nn.Module, x: Tensor, sizes: Sizes) -> Report:
    """Measure everything on a network and images.

    Args:
        model: The network in eval mode. From here on only the weights of its layers require a gradient.
        x: Images, at least as many as the largest of ``sizes`` asks for.
        sizes: How much is measured.
    """
    layers = layers_of(model, x[:2])
    report = Report()
    for peer in peers.installed():
        report.figures.peers[peer.package] = {"version": peer.version}
    for size in sizes.batches:
        say(f"products on {size} images ...")
        products(report, model, layers, x[:size], sizes.rounds, slow_peers=size == min(sizes.batches))
    say(f"Lanczos, {', '.join(map(str, sizes.eigenpairs))} eigenvalues on {sizes.samples} images ...")
    unsure = least_sure(model, x, sizes.samples)
    truth = Reference(model, unsure)
    eigenvalues(report, model, layers, unsure, sizes, truth)
    say("uneven batches ...")
    uneven(report, model, layers, unsure, truth)
    say(f"Gram spectrum on {sizes.gram_samples} images ...")
    gram(report, model, layers, x[: sizes.gram_samples], sizes)
    say("κ and L ...")
    kappa_and_lipschitz(report, sizes)
    say("growth ...")
    growth(report, model, layers, x[: min(sizes.batches)], sizes.rounds)
    return report


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    """The model's layers; from here on their weights alone require a gradient, for us and for every peer."""
    layers = find_layers(model, x)
    wanted = {id(layer_weight(model, layer)) for layer in layers}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return layers


def least_sure(model: nn.Module, x: Tensor, count: int) -> Tensor:
    """The images with the smallest largest probability."""
    largest = torch.cat([soft_targets(model, part).amax(1) for part in x.split(250)])
    return x[largest.argsort(stable=True)[:count]]


def soft_targets(model: nn.Module, x: Tensor) -> Tensor:
    """The network's own probabilities: cross-entropy to them has the Hessian of the distill objective."""
    with torch.no_grad():
        return model(x).softmax(1)


def kept_operator(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor]) -> tuple[Hessian, float]:
    """The Hessian with all its graphs built and kept, and the bytes that these hold beside weights and images."""
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    operator = Hessian(model, layers, make_objective("distill", model, batches), graph_memory=GRAPH_MEMORY)
    # Only a graph that is built needs the folded forward passes: products walk the graph that is there.
    with batchnorm_folded(model, layers, batches[0]), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        operator.product(torch.ones(operator.size))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batches)}
    return operator, sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in own)


def products(
    report: Report, model: nn.Module, layers: Sequence[Layer], x: Tensor, rounds: int, *, slow_peers: bool
) -> None:
    """Full and per-layer products of ours and of every peer, in gradients over the same batch."""
    figures, targets = report.figures, soft_targets(model, x)
    operator, held = kept_operator(model, layers, [x])
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    parts = operator.split(vector)
    found = {peer.package: peer for peer in peers.installed()}
    contestants: dict[str, Callable[[], object]] = {
        "gradient": lambda: gradient(model, x, targets),
        "product": lambda: operator.product(vector),
        "layers": lambda: operator.layer_products(parts),
        **{name: _applied(peer.product(model, [(x, targets)]), vector) for name, peer in found.items()},
    }
    times = by_turns(contestants, rounds)
    cost = ratios(times, "gradient")
    figures.hvp_per_gradient = max(figures.hvp_per_gradient, cost["product"])
    figures.layer_hvps_per_gradient = max(figures.layer_hvps_per_gradient, cost["layers"])
    figures.mb_per_sample = max(figures.mb_per_sample, held / len(x) / 1e6)
    for name in found:
        figures.peers[name][f"hvp_per_gradient_{len(x)}"] = cost[name]
    # Dozens of gradients each: the smallest batch and one round show what there is to see.
    slow = {}
    if slow_peers:
        for name, peer in found.items():
            if peer.layer_products is not None:
                blocks = _applied(peer.layer_products(model, [(x, targets)]), vector)
                slow[name] = ratios(by_turns({"gradient": contestants["gradient"], name: blocks}, 1), "gradient")[name]
                figures.peers[name]["layer_hvps_per_gradient"] = slow[name]
    at = f"batch {len(x)}"
    unit = sorted(times["gradient"])[len(times["gradient"]) // 2]
    report.add(f"gradient, {at}", f"{1e3 * unit:.0f} ms")
    report.add(f"Hessian–vector product / gradient, {at}", f"{cost['product']:.2f}", "2.3", "2.0", _two(cost, found))
    names = f"all {len(layers)} per-layer products / gradient, {at}"
    report.add(names, f"{cost['layers']:.2f}", "9", "6.7", _two(slow, slow))
    report.add(f"MB per sample of the kept graph, {at}", f"{held / len(x) / 1e6:.2f}", "2.5")


def _applied(product: Callable[[Tensor], object], vector: Tensor) -> Callable[[], object]:
    return lambda: product(vector)


def _two(values: dict[str, float], names: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    return {name: f"{values[name]:.2f}" for name in names}


class Recorded:
    """An operator that remembers its first products, so that a run which starts as another did need not repeat them.

    Args:
        product: v ↦ H v.
    """

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self._product, self._known = product, list[tuple[Tensor, Tensor]]()
        self.seconds = 0.0

    def run(self, start: Tensor, k: int, tolerance: float) -> Eigenpairs:
        """Lanczos for the top k."""
        step = 0

        def product(vector: Tensor) -> Tensor:
            nonlocal step
            step += 1
            if step <= len(self._known) and torch.equal(self._known[step - 1][0], vector):
                return self._known[step - 1][1].clone()
            before = time.perf_counter()
            image = self._product(vector)
            self.seconds += time.perf_counter() - before
            if len(self._known) < min(step, RECORDED):
                self._known.append((vector.clone(), image.clone()))
            return image

        return lanczos(product, start, k, tolerance=tolerance)


def eigenvalues(
    report: Report, model: nn.Module, layers: Sequence[Layer], x: Tensor, sizes: Sizes, truth: Reference
) -> None:
    """Products that Lanczos takes, and errors of all eigenvalues against those in float64."""
    figures, targets = report.figures, soft_targets(model, x)
    exact = truth.eigenvalues()
    operator, _ = kept_operator(model, layers, [x])
    start = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    recorded, others = Recorded(operator.product), dict[str, str]()
    runs: dict[int, Eigenpairs] = {}
    beside: dict[int, float] = {}
    for k in reversed(sizes.eigenpairs):  # the longest first: the others start as it does
        began, before = time.perf_counter(), recorded.seconds
        runs[k] = recorded.run(start, k, TOLERANCE)
        beside[k] = time.perf_counter() - began - (recorded.seconds - before)
    for peer in peers.installed():
        if peer.eigenvalues is not None:
            say(f"the top {LEAD} by {peer.package} ...")
            values, count = peer.eigenvalues(model, (x, targets), LEAD)
            errors = relative_errors(values, exact)
            wrong = int((errors > TOLERANCE).sum())
            figures.peers[peer.package].update(
                eigenvalue_products=count, eigenvalues_wrong=wrong, eigenvalue_relative_error=float(errors.max())
            )
            others[peer.package] = f"{count}, {wrong} wrong (largest error {float(errors.max()):.0e})"
    asked = {10: "30", 50: "140", 200: "500"}
    for k in sizes.eigenpairs:
        figures.lanczos_products[str(k)] = runs[k].products
        errors = relative_errors(runs[k].values, exact)
        said = f"{runs[k].products}, {int((errors > TOLERANCE).sum())} wrong (largest error {float(errors.max()):.0e})"
        report.add(f"products for the top {k} eigenvalues", said, asked.get(k, ""), "", others if k == LEAD else None)
        report.growth.append(["k", f"{k}", "", f"{runs[k].products} products, {beside[k]:.1f} s beside them"])
    by_lanczos = relative_errors(recorded.run(start, LEAD, EXACT).values, exact)
    spectrum = gram_spectrum(model, layers, [x], {layer.name: {} for layer in layers}, k=LEAD)
    by_gram = relative_errors(spectrum.values[:LEAD], exact)
    figures.eigenvalue_relative_error = float(max(by_lanczos.max(), by_gram.max()))
    precise = f"{by_lanczos.max():.1e} Lanczos, {by_gram.max():.1e} Gram"
    report.add(f"relative error of the top {LEAD}, float32 against float64", precise, "1e-5")


def uneven(report: Report, model: nn.Module, layers: Sequence[Layer], x: Tensor, truth: Reference) -> None:
    """Error of a product over batches of different sizes, against float64 over all images at once."""
    pieces = x.split([len(x) - len(x) // 4, len(x) // 4])
    operator, _ = kept_operator(model, layers, pieces)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(1))
    exact = truth.product(vector)

    def error(image: Tensor) -> float:
        return float((image.double() - exact).norm() / exact.norm())

    others = {}
    for peer in peers.installed():
        off = error(peer.product(model, [(piece, soft_targets(model, piece)) for piece in pieces])(vector))
        report.figures.peers[peer.package]["uneven_batches_error"] = off
        others[peer.package] = f"{off:.1e}"
    report.add("error of a product over uneven batches", f"{error(operator.product(vector)):.1e}", "", "", others)


def gram(report: Report, model: nn.Module, layers: Sequence[Layer], x: Tensor, sizes: Sizes) -> None:
    """Time of the Gram spectrum in gradients over the same images in the same batches."""
    batches = list(x.split(max(sizes.batches)))
    targets = [soft_targets(model, batch) for batch in batches]
    pairs = 0

    def spectrum() -> None:
        nonlocal pairs
        result = gram_spectrum(model, layers, batches, {layer.name: {} for layer in layers}, k=64)
        pairs = len(result.values)

    contestants = {
        "gradient": lambda: [gradient(model, *each) for each in zip(batches, targets, strict=True)],
        "gram": spectrum,
    }
    cost = ratios(by_turns(contestants, max(1, sizes.rounds // 2)), "gradient")["gram"]
    report.figures.gram_gradients = cost
    report.add(f"Gram spectrum of {len(x)} images / gradient", f"{cost:.1f} ({pairs} eigenpairs)", "12", "3")


def kappa_and_lipschitz(report: Report, sizes: Sizes) -> None:
    """Seconds for κ and L of every layer of a ReLU network on random inputs."""
    torch.manual_seed(0)
    net = mlp(sizes.network).eval()
    x = torch.rand(sizes.kappa_samples, sizes.network[0])
    layers = find_layers(net, x)
    needs = frozenset({"kappa", "lipschitz"})
    times = by_turns({"measure": lambda: measure(net, [x], layers=layers, needs=needs, samples=len(x))}, sizes.rounds)
    report.figures.kappa_lipschitz_seconds = sorted(times["measure"])[len(times["measure"]) // 2]
    name = f"κ and L of all layers of {'-'.join(map(str, sizes.network))}, {len(x)} samples"
    report.add(name, f"{report.figures.kappa_lipschitz_seconds:.3f} s", "1 s")


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Example:
        >>> [type(module).__name__ for module in mlp([4, 3, 2])]
        ['Linear', 'ReLU', 'Linear']
    """
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def growth(report: Report, model: nn.Module, layers: Sequence[Layer], x: Tensor, rounds: int) -> None:
    """How costs grow with batches, layers and parameters, three sizes each."""
    for count in (1, 2, 4):
        _grow(report, "batches", count, model, layers, [x.roll(i, 0) for i in range(count)], rounds)
    for blocks in (1, 2, 3):
        net = ResNet(blocks).eval()
        inside = layers_of(net, x)
        _grow(report, "layers", len(inside), net, inside, [x], rounds)
    for width in (256, 512, 1024):
        net = mlp((x[0].numel(), width, width, 10)).eval()
        flat = x.flatten(1)
        inside = layers_of(net, flat)
        _grow(report, "parameters", sum(layer.weights for layer in inside), net, inside, [flat], rounds)


def _grow(
    report: Report,
    axis: str,
    size: int,
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    rounds: int,
) -> None:
    operator, held = kept_operator(model, layers, batches)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    parts, targets = operator.split(vector), [soft_targets(model, batch) for batch in batches]
    times = by_turns(
        {
            "gradient": lambda: [gradient(model, *each) for each in zip(batches, targets, strict=True)],
            "product": lambda: operator.product(vector),
            "layers": lambda: operator.layer_products(parts),
        },
        rounds,
    )
    cost = ratios(times, "gradient")
    said = f"product {cost['product']:.2f}, per-layer products {cost['layers']:.2f} gradients, {held / 1e6:.0f} MB kept"
    report.growth.append([axis, f"{size:,}", f"{1e3 * sorted(times['gradient'])[rounds // 2]:.1f} ms", said])


def say(message: str) -> None:
    """Say what is being done on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
