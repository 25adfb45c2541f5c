"""Speed and size of entropy-coded codes, beside their entropy and general compressors.

python benchmarks/coding.py
"""

from __future__ import annotations

import argparse
import json
import lzma
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from stopwatch import machine

from lightning_caq.quantizers.packing.contexts import MatrixForm
from lightning_caq.quantizers.packing.entropy import decode, encode
from lightning_caq.report import text_table

ROWS, COLUMNS = 1024, 512


@dataclass(frozen=True)
class Row:
    """Codes of one size; of each coder its bits a code, and the best speed of some rounds on one core.

    Attributes:
        scale: Scale of the Laplace law that codes are drawn from.
        rows: Rows of each matrix, which are coded side by side.
        matrices: Number of matrices.
        entropy: Entropy of the codes, bits.
        bits: Bits a code.
        encode: Millions of codes a second.
        decode: Millions of codes a second.
        zstandard: Bits a code with ``zstandard`` at level 19, one byte a code, if installed and codes fit.
        lzma: Bits a code with ``lzma``.
    """

    scale: float
    rows: int
    matrices: int
    entropy: float
    bits: float
    encode: float
    decode: float
    zstandard: float | None
    lzma: float | None


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.matrices < 1 or args.rounds < 1 or min(args.scale) <= 0:
        sys.exit("coding.py: --matrices, --rounds and --scale must be positive.")
    rows = [measure(scale, args.rows, args.matrices, args.rounds) for scale in args.scale]
    command = shlex.join(["python", "benchmarks/coding.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args.rounds, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--scale", type=float, nargs="+", default=[0.3, 1.0, 4.0, 40.0], help="scales of the codes")
    result.add_argument("--rows", type=int, default=ROWS, help="rows of each matrix")
    result.add_argument("--matrices", type=int, default=8, help="number of matrices")
    result.add_argument("--rounds", type=int, default=3, help="rounds, of which the fastest counts")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def measure(scale: float, rows: int, count: int, rounds: int) -> Row:
    """Code and decode matrices of one scale."""
    rng, form = np.random.default_rng(0), MatrixForm(rows, COLUMNS)
    matrices = [rng.laplace(0, scale, (rows, COLUMNS)).round().astype(np.int32) for _ in range(count)]
    codes, forms = np.stack(matrices), [form] * count
    writing, reading = [], []
    for _ in range(rounds):
        start = time.process_time()
        stream = encode(matrices, forms)
        middle = time.process_time()
        again = decode(stream, forms)
        writing.append(middle - start)
        reading.append(time.process_time() - middle)
        assert all(np.array_equal(a, b) for a, b in zip(matrices, again, strict=True))
    million = codes.size / 1e6
    general = general_coders(codes)
    return Row(
        scale=scale,
        rows=rows,
        matrices=count,
        entropy=entropy(codes),
        bits=8 * len(stream) / codes.size,
        encode=million / min(writing),
        decode=million / min(reading),
        zstandard=general.get("zstandard"),
        lzma=general.get("lzma"),
    )


def entropy(codes: NDArray[np.int32]) -> float:
    """Bits a code of the best code without contexts."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / counts.sum())


def general_coders(codes: NDArray[np.int32]) -> dict[str, float]:
    """Bits a code of compressors of bytes; none where a code takes more than a byte."""
    if np.abs(codes).max() > 127:
        return {}
    payload = codes.astype(np.int8).tobytes()
    sizes = {"lzma": len(lzma.compress(payload, preset=6))}
    if find_spec("zstandard"):
        import zstandard

        sizes["zstandard"] = len(zstandard.ZstdCompressor(level=19).compress(payload))
    return {name: 8 * size / codes.size for name, size in sizes.items()}


def as_text(rows: Sequence[Row], rounds: int, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = ["scale", "entropy", "bits", "encode M/s", "decode M/s", "zstandard", "lzma"]
    cells = [
        [
            f"{row.scale:g}",
            *(f"{x:.3f}" for x in (row.entropy, row.bits)),
            *(f"{x:.1f}" for x in (row.encode, row.decode)),
            *("–" if x is None else f"{x:.3f}" for x in (row.zstandard, row.lzma)),
        ]
        for row in rows
    ]
    notes = (
        f"{rows[0].matrices} matrices of {rows[0].rows:,} by {COLUMNS} independent codes; bits a "
        f"code, and millions of codes a second of processor time, fastest of {rounds} rounds.\n{machine()}\n"
        f"Command: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    main()
