"""Speed of packing codes into bytes and of unpacking them, beside that of copying the codes.

python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from stopwatch import by_turns, machine, ratios

from lightning_caq.quantizers.packing.bit_packing import pack, unpack
from lightning_caq.report import text_table


@dataclass(frozen=True)
class Row:
    """One bit-width; speeds count one byte a code, as codes take before packing.

    Attributes:
        bits: Bit-width of the codes.
        codes: Number of codes.
        pack: Speed of packing, in GB/s, median over the rounds.
        unpack: Speed of unpacking, in GB/s.
        copy: Speed of ``Tensor.clone`` on the codes, in GB/s.
        pack_ratio: Time of packing over that of copying, median over the rounds.
        unpack_ratio: Time of unpacking over that of copying.
    """

    bits: int
    codes: int
    pack: float
    unpack: float
    copy: float
    pack_ratio: float
    unpack_ratio: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.codes < 1 or args.rounds < 1 or not set(args.bits) <= set(range(1, 9)):
        sys.exit("packing.py: --codes and --rounds must be positive, --bits from 1 to 8.")
    rows = [measure(args.codes, bits, args.rounds) for bits in args.bits]
    command = shlex.join(["python", "benchmarks/packing.py", *(sys.argv[1:] if argv is None else argv)])
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_text(rows, args.rounds, command))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--bits", type=int, nargs="+", default=list(range(1, 9)), help="bit-widths, one row each")
    result.add_argument("--codes", type=int, default=2**22, help="number of codes")
    result.add_argument("--rounds", type=int, default=21, help="rounds that count")
    result.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return result


def measure(count: int, bits: int, rounds: int) -> Row:
    """Time one bit-width, the three contestants by turns."""
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    times = by_turns(
        {"pack": lambda: pack(codes, bits), "unpack": lambda: unpack(packed, bits, count), "copy": codes.clone}, rounds
    )
    speed = {name: count / statistics.median(each) / 1e9 for name, each in times.items()}
    ratio = ratios(times, "copy")
    return Row(bits, count, speed["pack"], speed["unpack"], speed["copy"], ratio["pack"], ratio["unpack"])


def as_text(rows: Sequence[Row], rounds: int, command: str) -> str:
    """The table, and what a reader needs to judge and to repeat it."""
    header = ["bits", "pack GB/s", "unpack GB/s", "copy GB/s", "pack / copy", "unpack / copy"]
    cells = [
        [str(row.bits), *(f"{x:.2f}" for x in (row.pack, row.unpack, row.copy, row.pack_ratio, row.unpack_ratio))]
        for row in rows
    ]
    notes = (
        f"{rows[0].codes:,} codes, one byte each before packing; medians over {rounds} rounds by turns. The last two "
        f"columns are ratios of time.\n{machine()}\nCommand: {command}"
    )
    return f"{text_table(header, cells)}\n\n{notes}"


if __name__ == "__main__":
    main()
