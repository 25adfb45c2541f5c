"""The report: what was done, what it cost and what it gave, as plain numbers and one readable table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_caq.notes import Note
from lightning_caq.scores import Difference, LogRatio
from lightning_caq.studies import LayerRate, LayerReason, RateLimit, RatePoint, Studies, Tightness


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
class Certainty:
    """How sure one network's metric is.

    Attributes:
        samples: Number of samples that it rests on.
        stderr: Its standard error.
        differences: Other variant to the standard error of the difference from it, paired by samples.
    """

    samples: int
    stderr: float
    differences: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputError:
    """The output error of one network on the calibration samples that nothing was fitted to.

    Attributes:
        value: Root mean square over samples of ‖F_q(x) − F(x)‖, a part of the output.
        ratio: By what factor it is that of the quantized network, sample by sample; ``None`` for that one itself.
    """

    value: float
    ratio: LogRatio | None = None


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
        certainty: ``"<variant>/<metric>"`` to how sure it is, where that is known.
        output_errors: Variant to the output error on the samples held out.
        reasons: Why each layer has its bits.
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
    certainty: dict[str, Certainty] = field(default_factory=dict)
    output_errors: dict[str, OutputError] = field(default_factory=dict)
    reasons: tuple[LayerReason, ...] = ()

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
        data["certainty"] = {name: Certainty(**x) for name, x in data.get("certainty", {}).items()}
        data["output_errors"] = {v: _output_error(**x) for v, x in data.get("output_errors", {}).items()}
        data["reasons"] = tuple(LayerReason(**x) for x in data.get("reasons", ()))
        # Notes of earlier versions are strings.
        notes = tuple(Note(**note) if isinstance(note, dict) else Note(note) for note in data["notes"])
        return cls(**{**data, "notes": notes})

    def table(self) -> str:
        """As text what the reader should know, then two tables: the layers, and the variants with sizes and metrics."""
        notes = "\n".join(f"Warning: {note}" if note.severity == "warning" else f"Note: {note}" for note in self.notes)
        return "\n\n".join(filter(None, (notes, self.tables())))

    def tables(self) -> str:
        """``table`` without notes, for a reader who has had them."""
        layers, networks = text_table(*self.layer_cells()), text_table(*self.variant_cells())
        marked = any(reason.source != "modelled" and reason.damage is not None for reason in self.reasons)
        of_layers = "\n* measured, with only this layer rounded; all else is modelled" if marked else ""
        return f"{layers}{of_layers}\n\n" + "\n".join(filter(None, (networks, self.legend)))

    def difference(self, variant: str, other: str, metric: str) -> Difference | None:
        """By how much a metric of one network is above that of another; ``None`` where one of them lacks it.

        Example:
            >>> metrics = {"float/acc": 0.75, "quantized/acc": 0.5}
            >>> sure = {"quantized/acc": Certainty(100, 0.05, {"float": 0.125})}
            >>> report = QuantizationReport("cet", "", (), {}, metrics, certainty=sure)
            >>> report.difference("quantized", "float", "acc")
            Difference(value=-0.25, stderr=0.125)
        """
        values = [self.metrics.get(f"{v}/{metric}") for v in (variant, other)]
        if values[0] is None or values[1] is None:
            return None
        sure = self.certainty.get(f"{variant}/{metric}")
        return Difference(values[0] - values[1], sure.differences.get(other) if sure else None)

    @property
    def legend(self) -> str:
        """How to read ± and ≈ in the table of variants; empty where nothing is known of how sure its figures are."""
        counts: dict[int, list[str]] = {}
        for name in self.metric_names:
            if sure := next((x for key, x in self.certainty.items() if key.split("/", 1)[1] == name), None):
                counts.setdefault(sure.samples, []).append(name)
        if not counts:
            return ""
        listed = "; ".join(f"{', '.join(names)} on {n:,} samples" for n, names in counts.items())
        return (
            f"± one standard error ({listed}), in brackets the difference from float,\npaired by samples; "
            "≈ within noise: less than 2 standard errors."
        )

    def layer_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of layers."""
        quantized = [v for v in self.variants if any(v in r.bits for r in self.layers)]
        with_inputs = [v for v in quantized if any(v in r.input_bits for r in self.layers)]
        why = {reason.name: reason for reason in self.reasons if reason.damage is not None}
        unit = next((reason.unit for reason in why.values()), "")
        total = sum(r.weights for r in self.layers)
        header = ["layer", "kind", "weights", "share", *(self._bits_title("bits", v) for v in quantized)]
        header += [self._bits_title("input bits", v) for v in with_inputs]
        header += [f"damage{f' ({unit})' if unit else ''}", "a width less", "a width more", "bought/kB"] if why else []
        header += ["κ", "L"]
        rows = [
            [
                r.name,
                r.kind,
                f"{r.weights:,}",
                f"{100 * r.weights / max(total, 1):.0f} %",
                *(_bits(r.bits.get(v)) for v in quantized),
                *(_bits(r.input_bits.get(v)) for v in with_inputs),
                *(_reason_cells(why.get(r.name)) if why else ()),
                _figure(r.kappa, 3),
                _figure(r.lipschitz, 3),
            ]
            for r in self.layers
        ]
        return header, rows

    def variant_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of variants."""
        names = self.metric_names
        of_memory = any(size.memory_ratio is not None for size in self.sizes.values())
        header = ["network", "avg bits", "ratio", *(["ratio to memory"] if of_memory else []), "kB"]
        header += ["output error"] if self.output_errors else []
        header += names
        rows = [
            [
                self.title(variant),
                f"{size.avg_bits:.2f}",
                f"{size.ratio:.2f}x",
                *(["–" if size.memory_ratio is None else f"{size.memory_ratio:.2f}x"] if of_memory else []),
                f"{size.bytes / 1000:,.1f}",
                *([self._error_cell(variant)] if self.output_errors else []),
                *(self._metric_cell(variant, name) for name in names),
            ]
            for variant, size in ((v, self.sizes[v]) for v in self.variants)
        ]
        return header, rows

    def title(self, variant: str) -> str:
        """How a variant is called in tables and figures, such as ``"quantized (cet)"``."""
        return f"quantized ({self.method})" if variant == "quantized" else variant

    def _metric_cell(self, variant: str, name: str) -> str:
        value, sure = self.metrics.get(f"{variant}/{name}"), self.certainty.get(f"{variant}/{name}")
        if value is None or sure is None:
            return _figure(value)
        change = self.difference(variant, "float", name)
        if variant == "float" or change is None or change.stderr is None or self.metrics[f"float/{name}"] == 0:
            return f"{value:.4g} ± {sure.stderr:.2g}" if sure.stderr else f"{value:.4g}"
        return f"{value:.4g} ({in_figures(change)}){' ≈' if change.within_noise else ''}"

    def _error_cell(self, variant: str) -> str:
        error = self.output_errors.get(variant)
        if error is None:
            return "–"
        return f"{error.value:.1%}" + (f" ({as_factor(error.ratio)})" if error.ratio else "")

    def _bits_title(self, bits: str, variant: str) -> str:
        return bits if variant == "quantized" else f"{bits} {variant}"


def _output_error(value: float, ratio: dict[str, Any] | None) -> OutputError:
    return OutputError(value, None if ratio is None else LogRatio(**ratio))


def in_figures(change: Difference) -> str:
    """A difference with its standard error.

    Example:
        >>> in_figures(Difference(-0.0075, 0.012)), in_figures(Difference(0.0, None))
        ('−0.0075 ± 0.012', '±0')
    """
    value = f"{change.value:+.2g}".replace("-", "−") if change.value else "±0"
    return value if change.stderr is None else f"{value} ± {change.stderr:.2g}"


def as_factor(ratio: LogRatio) -> str:
    """A log ratio as a factor with its standard error, and whether that is within noise.

    Example:
        >>> as_factor(LogRatio(0.0953, 0.02, 64)), as_factor(LogRatio(0.01, 0.02, 64))
        ('1.10x ± 0.02', '1.01x ± 0.02 ≈')
    """
    error = "" if ratio.stderr is None else f" ± {ratio.factor * ratio.stderr:.2f}"
    return f"{ratio.factor:.2f}x{error}{' ≈' if ratio.within_noise else ''}"


def _reason_cells(reason: LayerReason | None) -> tuple[str, ...]:
    if reason is None:
        return ("–",) * 4
    mark = "*" if reason.source != "modelled" else ""
    figures = (reason.damage_fewer, reason.damage_more, reason.bought)
    return (f"{_figure(reason.damage, 2)}{mark}", *(_figure(x, 2) for x in figures))


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


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
