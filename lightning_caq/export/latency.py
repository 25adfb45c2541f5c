"""Latency: how long a network takes in ONNX Runtime, in float32 and as it was exported."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from lightning_caq.errors import ExportError
from lightning_caq.export.onnx import check_packages, float_graph
from lightning_caq.export.onnx_inputs import ExampleInputs, read_example

_RUNS = 30


@dataclass(frozen=True)
class Latency:
    """Times of two networks in one runtime, taken by turns.

    Attributes:
        runtime: The runtime and its version.
        batch: Number of samples in the example.
        threads: Threads of the runtime.
        float_ms: Median time of the float32 network, milliseconds.
        quantized_ms: Median time of the exported one.
        speedup: Median over the runs of how many times as long the float32 network took, one after the other.
        runs: Runs of each.
    """

    runtime: str
    batch: int
    threads: int
    float_ms: float
    quantized_ms: float
    speedup: float
    runs: int

    def __str__(self) -> str:
        """One line for people.

        Example:
            >>> print(Latency("onnxruntime 1.22", 1, 2, float_ms=48.0, quantized_ms=12.0, speedup=4.0, runs=9))
            onnxruntime 1.22, batch 1, 2 threads: float32 48.0 ms, quantized 12.0 ms, 4.00 times as fast (9 runs each)
        """
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.runtime}, batch {self.batch}, {threads}: float32 {self.float_ms:.1f} ms, quantized "
            f"{self.quantized_ms:.1f} ms, {self.speedup:.2f} times as fast ({self.runs} runs each)"
        )


def benchmark(
    model: nn.Module, path: str | Path, example_input: Any, *, threads: int | None = None, runs: int = _RUNS
) -> Latency:
    """Time a float32 network and an exported one in ONNX Runtime, by turns, on the CPU.

    By turns, so that a slow moment of the machine hits both. The first runs do not count.

    Args:
        model: The network, quantized or not; in float32 it takes the same time either way. Left as it was.
        path: The file that ``export_onnx`` wrote.
        example_input: What to run both on, as for ``export_onnx``.
        threads: Threads of the runtime; by default as many as the machine has cores.
        runs: How often each is run.

    Returns:
        The times.

    Raises:
        ExportError: If packages are missing, there is no such file, or the network cannot be exported.

    Example:
        >>> import pytest, tempfile, torch
        >>> _ = [pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript")]
        >>> from lightning_caq import export_onnx, quantize
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = quantize(net, [torch.randn(64, 8)], avg_bits=8, rounding="nearest")
        >>> x = torch.randn(2, 8)
        >>> path = export_onnx(net, f"{tempfile.mkdtemp()}/net.onnx", x).path
        >>> benchmark(net, path, x, threads=1, runs=3).batch
        2
    """
    check_packages("benchmark")
    if not Path(path).is_file():
        raise ExportError(f"{path} is no file; give the path that export_onnx wrote.")
    if min(runs, 1 if threads is None else threads) < 1:
        raise ExportError(f"threads={threads!r} and runs={runs!r} have to be whole numbers from 1 up.")
    threads = threads or os.cpu_count() or 1
    example = read_example(model, example_input)
    float32 = session(float_graph(model, example).SerializeToString(), threads)
    quantized = session(Path(path).read_bytes(), threads)
    times = by_turns({"float32": float32, "quantized": quantized}, example, runs)
    return Latency(
        runtime=f"onnxruntime {import_module('onnxruntime').__version__}",
        batch=next((len(x) for x in example.named.values() if x.ndim), 1),
        threads=threads,
        float_ms=statistics.median(times["float32"]),
        quantized_ms=statistics.median(times["quantized"]),
        speedup=ratio(times["float32"], times["quantized"]),
        runs=runs,
    )


def session(payload: bytes, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU with so many threads.

    Args:
        payload: The bytes of an ONNX file.
        threads: Threads of each operator.

    Raises:
        ExportError: If ONNX Runtime refuses the network.
    """
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ExportError(f"ONNX Runtime cannot run the network: {str(error).strip().splitlines()[0]}") from error


def by_turns(sessions: Mapping[str, Any], example: ExampleInputs, runs: int) -> dict[str, list[float]]:
    """Milliseconds of every session in every run, one after the other, after two runs that do not count.

    Args:
        sessions: Sessions by name.
        example: What to run them on; inputs that have no such name take the tensors in their order.
        runs: How often each is run.
    """
    arrays = {name: x.detach().cpu().numpy() for name, x in example.named.items()}
    feeds = {}
    for name, one in sessions.items():
        wanted = [x.name for x in one.get_inputs()]
        known = set(wanted) <= arrays.keys()
        feeds[name] = {key: arrays[key] for key in wanted} if known else dict(zip(wanted, arrays.values(), strict=True))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(-2, runs):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, feeds[name])
            if run >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """Median over the runs of one time over the other.

    Example:
        >>> ratio([4.0, 9.0, 4.0], [2.0, 3.0, 2.0])
        2.0
    """
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
