"""The report: what was done, what it cost and what it gave, as plain numbers and one readable table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_caq.notes import Note
from lightning_caq.studies import LayerRate, RateLimit, RatePoint, Studies, Tightness


@dataclass(frozen=True)
class LayerRow:
    """One row of the report.

    Attributes:
        name: The layer.
        kind: Its kind, such as ``"conv2d"``.
        weights: Number of weights.
        macs: Multiply–accumulates a sample.
        kappa: κ_i, or ``None``.
        lipschitz: L_i, or ``None``.
        bits: Bit-width by variant, ``"quantized"`` and each compared method; an average where channels differ.
        input_bits: Bit-width of the layer's input by variant; without those that leave it in float32.
    """

    name: str
    kind: str
    weights: int
    macs: int
    kappa: float | None
    lipschitz: float | None
    bits: dict[str, int | float]
    input_bits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """The size of one variant of the network.

    Attributes:
        avg_bits: Average bits a quantized weight, scales not counted.
        ratio: Float32 size over quantized size, scales, zero points and excluded layers counted.
        bytes: Bytes of the weights, scales and zero points.
        memory_ratio: Size that the float network takes in memory over quantized size; ``None`` where that is in
            float32.
    """

    avg_bits: float
    ratio: float
    bytes: int
    memory_ratio: float | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What was done to a network.

    Attributes:
        method: The method that allocated the bits.
        budget: The budget in words, such as ``"avg_bits=3"``.
        layers: One row a layer, in order of execution.
        sizes: Size by variant: ``"float"``, ``"quantized"`` and each compared method.
        metrics: ``"<variant>/<metric>"`` to value, such as ``"quantized/val_acc"``.
        predicted_loss: Variant to the loss change that the profile predicts, layer by layer, nat.
        options: Every option, so that the run can be repeated.
        versions: Versions of Python and of the packages that computed the result.
        seconds: Step to the seconds it took.
        notes: What the reader should know, warnings first: weights that stay in float32, repairs that were dropped.
            Each is a ``Note``, a string with a ``severity``.
        tightness: What composition predicted of the output error for the plan's bits with nearest rounding, beside the
            error that was observed; ``None`` if it was not measured.
        rate_limit: Bits of entropy-coded layers beside Shannon's lower bound; ``None`` for fixed widths.
        studies: What was computed for the sake of understanding the result.
    """

    method: str
    budget: str
    layers: tuple[LayerRow, ...]
    sizes: dict[str, Size]
    metrics: dict[str, float]
    predicted_loss: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    tightness: Tightness | None = None
    rate_limit: RateLimit | None = None
    studies: Studies = field(default_factory=Studies)

    def __post_init__(self) -> None:
        notes = [note if isinstance(note, Note) else Note(note) for note in self.notes]
        object.__setattr__(self, "notes", tuple(sorted(notes, key=lambda note: note.severity != "warning")))

    @property
    def variants(self) -> tuple[str, ...]:
        """The networks that were compared, the float one first; the chosen one goes by ``"quantized"`` alone."""
        return tuple(variant for variant in self.sizes if variant != self.method)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, without the variant."""
        return tuple(dict.fromkeys(key.split("/", 1)[1] for key in self.metrics))

    def to_json(self) -> str:
        """The report as JSON text."""
        notes = [{"text": str(note), "severity": note.severity} for note in self.notes]
        return json.dumps({**asdict(self), "notes": notes}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> QuantizationReport:
        """The report that ``to_json`` wrote."""
        data = json.loads(text)
        data["layers"] = tuple(LayerRow(**row) for row in data["layers"])
        data["sizes"] = {name: Size(**size) for name, size in data["sizes"].items()}
        if data.get("tightness") is not None:
            data["tightness"] = Tightness(**data["tightness"])
        if data.get("rate_limit") is not None:
            rows, tried = data["rate_limit"]["layers"], data["rate_limit"].get("tried", ())
            data["rate_limit"] = RateLimit(
                tuple(LayerRate(**row) for row in rows), tuple(RatePoint(**point) for point in tried)
            )
        if "studies" in data:
            data["studies"] = Studies.from_dict(data["studies"])
        # Notes of earlier versions are strings.
        notes = tuple(Note(**note) if isinstance(note, dict) else Note(note) for note in data["notes"])
        return cls(**{**data, "notes": notes})

    def table(self) -> str:
        """As text what the reader should know, then two tables: the layers, and the variants with sizes and metrics."""
        notes = "\n".join(f"Warning: {note}" if note.severity == "warning" else f"Note: {note}" for note in self.notes)
        return "\n\n".join(filter(None, (notes, text_table(*self.layer_cells()), text_table(*self.variant_cells()))))

    def layer_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of layers."""
        quantized = [v for v in self.variants if v != "float"]
        with_inputs = [v for v in quantized if any(v in r.input_bits for r in self.layers)]
        header = ["layer", "kind", "weights", "κ", "L", *(self._bits_title("bits", v) for v in quantized)]
        header += [self._bits_title("input bits", v) for v in with_inputs]
        rows = [
            [
                r.name,
                r.kind,
                f"{r.weights:,}",
                _figure(r.kappa),
                _figure(r.lipschitz),
                *(_bits(r.bits.get(v)) for v in quantized),
                *(_bits(r.input_bits.get(v)) for v in with_inputs),
            ]
            for r in self.layers
        ]
        return header, rows

    def variant_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of variants."""
        names = self.metric_names
        of_memory = any(size.memory_ratio is not None for size in self.sizes.values())
        header = ["network", "avg bits", "ratio", *(["ratio to memory"] if of_memory else []), "kB", *names]
        rows = [
            [
                self.title(variant),
                f"{size.avg_bits:.2f}",
                f"{size.ratio:.2f}x",
                *(["–" if size.memory_ratio is None else f"{size.memory_ratio:.2f}x"] if of_memory else []),
                f"{size.bytes / 1000:,.1f}",
                *(_figure(self.metrics.get(f"{variant}/{name}")) for name in names),
            ]
            for variant, size in ((v, self.sizes[v]) for v in self.variants)
        ]
        return header, rows

    def title(self, variant: str) -> str:
        """How a variant is called in tables and figures, such as ``"quantized (cet)"``."""
        return f"quantized ({self.method})" if variant == "quantized" else variant

    def _bits_title(self, bits: str, variant: str) -> str:
        return bits if variant == "quantized" else f"{bits} {variant}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def text_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table in monospaced text: words flush left, figures flush right.

    Example:
        >>> print(text_table(["layer", "bits"], [["conv1", "8"], ["fc", "2"]]))
        layer  bits
        -----  ----
        conv1     8
        fc        2
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = _figures(lines)

    def join(line: list[str]) -> str:
        cells = (x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join([join(header), "  ".join("-" * w for w in widths), *(join(row) for row in lines[1:])])


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown: words flush left, figures flush right.

    Example:
        >>> print(markdown_table(["layer", "bits"], [["conv1", "8"]]))
        | layer | bits |
        | :--- | ---: |
        | conv1 | 8 |
    """
    lines = [header, *rows]
    rule = ["---:" if right else ":---" for right in _figures(lines)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _figures(lines: list[list[str]]) -> list[bool]:
    """For each column whether it holds figures; a name may be one too ("0" in a Sequential), so not the first."""
    columns = list(zip(*lines, strict=True))
    return [c > 0 and all(_is_figure(x) for x in cells[1:]) for c, cells in enumerate(columns)]


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "–-" or cell in ("nan", "inf")
