"""Latency in ONNX Runtime: float32, exported in integers, and ONNX Runtime's own quantization of the same network.

All three run by turns in one process on the CPU. Weights are random, batch-norm statistics those of the inputs; neither
changes how long a network takes. ONNX Runtime's ``quantize_static`` is given the float32 network, per-channel weights
and the QDQ format, as its documentation advises for CPUs with VNNI.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from networks import ResNet
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from size import CASES, Case, images, words
from torch import nn

from lightning_caq import export_onnx, quantize
from lightning_caq.export.latency import by_turns, ratio, session
from lightning_caq.export.onnx import float_graph
from lightning_caq.export.onnx_inputs import read_example

MODELS = {
    **{name: CASES[name] for name in ("resnet18", "resnet50", "mobilenet_v2", "bert_base")},
    "resnet20": Case(lambda classes: ResNet(3), classes=10, pixels=32),
}
SAMPLES = 8


@dataclass(frozen=True)
class Row:
    """Times of one network at one batch size.

    Attributes:
        model: Its name.
        runtime: The runtime and its version.
        batch: Samples that run at a time.
        threads: Threads of the runtime.
        float_ms: Median time in float32, milliseconds.
        quantized_ms: Median time in integers.
        speedup: Median over the runs of the first over the second.
        static_ms: Median time of the network that ``quantize_static`` made.
        static_speedup: Its speedup.
        of_static: Median over the runs of its time over ours: above 1 where ours is faster.
        notes: What the export said.
    """

    model: str
    runtime: str
    batch: int
    threads: int
    float_ms: float
    quantized_ms: float
    speedup: float
    static_ms: float
    static_speedup: float
    of_static: float
    notes: tuple[str, ...]


def network_and_samples(case: Case, samples: int) -> tuple[nn.Module, Any]:
    """A network with calibrated statistics, and what to run it on."""
    torch.manual_seed(0)
    network = case.make(case.classes)
    if not case.pixels:
        return network.eval(), words(samples, int(network.config.vocab_size))  # type: ignore[union-attr, arg-type]
    data = images(samples, case.pixels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics become those of all that ran
    with torch.no_grad():
        network.train()(data)
    return network.eval(), data


def first(samples: Any, count: int) -> Any:
    """The first of some samples."""
    return {key: x[:count] for key, x in samples.items()} if isinstance(samples, dict) else samples[:count]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The samples for ``quantize_static``, one at a time."""

    def __init__(self, names: list[str], arrays: list[Any]) -> None:
        count = len(arrays[0])
        self._feeds: Iterator[dict[str, Any]] = iter(
            [{n: x[i : i + 1] for n, x in zip(names, arrays, strict=True)} for i in range(count)]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def static(payload: bytes, samples: Any, folder: Path) -> bytes:
    """The same network by ``quantize_static``."""
    source, prepared, target = (folder / name for name in ("float.onnx", "prepared.onnx", "static.onnx"))
    source.write_bytes(payload)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    names = [x.name for x in session(payload, 1).get_inputs()]
    arrays = [x.numpy() for x in (samples.values() if isinstance(samples, dict) else [samples])]
    quantize_static(
        str(prepared),
        str(target),
        _Reader(names, arrays),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return target.read_bytes()


def rows(name: str, batches: list[int], threads: int, runs: int) -> Iterator[Row]:
    """Quantize a network both ways and time it."""
    network, samples = network_and_samples(MODELS[name], SAMPLES)
    payload = float_graph(network, read_example(network, first(samples, 2))).SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        own = static(payload, first(samples, 4), Path(folder))
        quantize(
            network, [samples], avg_bits=8, bits=(8,), method="uniform", rounding="nearest", batchnorm="keep",
            compare=(), guard=False, activation_bits=8, runtime="onnxruntime", calibration_samples=SAMPLES,
            curvature_samples=2,
        )  # fmt: skip
        export = export_onnx(network, Path(folder) / "net.onnx", samples, integers="all")
        ours = export.path.read_bytes()
    sessions = {
        "float32": session(payload, threads), "ours": session(ours, threads), "static": session(own, threads)
    }  # fmt: skip
    for batch in batches:
        times = by_turns(sessions, read_example(network, first(samples, batch)), runs)
        yield Row(
            model=name,
            runtime=f"onnxruntime {onnxruntime.__version__}",
            batch=batch,
            threads=threads,
            float_ms=statistics.median(times["float32"]),
            quantized_ms=statistics.median(times["ours"]),
            speedup=ratio(times["float32"], times["ours"]),
            static_ms=statistics.median(times["static"]),
            static_speedup=ratio(times["float32"], times["static"]),
            of_static=ratio(times["static"], times["ours"]),
            notes=export.notes,
        )


def main() -> None:
    """Print the table, or its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given more than once; all by default")
    parser.add_argument("--batch", type=int, action="append", help="may be given more than once; 1 and 16 by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = []
    for name in options.model or MODELS:
        with contextlib.redirect_stdout(None):  # the exporters talk
            table += list(rows(name, options.batch or [1, 16], options.threads, options.runs))
    if options.json:
        print(json.dumps([asdict(row) for row in table], indent=1))
        return
    print("| network | batch | threads | float32 ms | integers ms | speedup | `quantize_static` | its time over ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for x in table:
        print(
            f"| {x.model} | {x.batch} | {x.threads} | {x.float_ms:.1f} | {x.quantized_ms:.1f} | {x.speedup:.2f}x | "
            f"{x.static_speedup:.2f}x | {x.of_static:.2f} |"
        )


if __name__ == "__main__":
    main()
