"""Options: everything a user may choose, checked in one place before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_caq.allocation.budget import Budget, ErrorBudget, make_budget
from lightning_caq.allocation.choose import check_separable, composing_method
from lightning_caq.allocation.methods import available_methods, get_method
from lightning_caq.allocation.mixed import MIXED, check_mixed
from lightning_caq.allocation.mixed import NEEDS as OF_MIXED
from lightning_caq.allocation.steps import check_continuous
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.network.meaning import Output
from lightning_caq.network.prepare import ForwardFunction, ModelUse
from lightning_caq.quantizers.grids.groups import GROUP_SIZES
from lightning_caq.quantizers.grids.ranges import SIGNED_BYTE
from lightning_caq.quantizers.grids.values import Quantizer
from lightning_caq.utilities.metric_names import Direction

_HOLD_ZERO = ("affine", "codebook")  # quantizers that can have the value zero
ALWAYS = frozenset({"kappa", "lipschitz", "inputs"})  # what reports show, whatever the method
_FEWEST = 0.25  # average bits that a search goes down to where codes are entropy-coded
# What the figures of a study show.
STUDIED = frozenset({"amplification", "output_error", "subspace", "loss_change", "density"})


@dataclass(frozen=True)
class QuantizationOptions:
    """What to do, as the user asked for it.

    Attributes:
        method: How bits are allocated: ``"cet"``, ``"caq"``, ``"uniform"`` or another registered method.
        avg_bits: Budget: average bits a weight. Give exactly one budget.
        ratio: Budget: float32 size over quantized size, scales and zero points counted.
        bops: Budget: billions of bit operations a sample, alone or together with ``avg_bits`` or ``ratio``.
        error: Budget: predicted output error as a part of the output; the smallest network within it is made.
        max_bytes: Budget: bytes of the file that ``save_quantized`` writes; for ``coding="entropy"``.
        max_drop: Budget: how much worse the metric ``monitor`` may get, two standard errors counted where they are
            known; the smallest network within it is looked for.
        monitor: The metric that ``max_drop`` watches, by the name it is logged under.
        monitor_mode: Whether a good network has a large metric (``"max"``) or a small one (``"min"``). ``"auto"`` goes
            by ``higher_is_better`` of a torchmetrics metric, by the mode of a ``ModelCheckpoint`` or ``EarlyStopping``
            that watches the same metric, or by its name, such as loss, error, perplexity or accuracy.
        max_evaluations: Networks that may be made and evaluated in the search for ``max_drop``.
        activation_bits: Bits of every quantized layer's input, 2 to 8; the first layer's input has 8, words of
            embeddings are left. ``None`` leaves inputs in float32. ``"mixed"`` chooses those of each layer, of ``bits``
            from 2 up, together with those of its weights within ``bops``.
        coding: ``"fixed"`` gives every layer a bit-width, for runtimes that want integers; ``"entropy"`` gives it a
            step, and codes without bounds that are entropy-coded, for the smallest file: bits are then fractional, and
            sizes are those of the coded bytes. Methods give sensitivities to it, ``bits`` are where they are measured.
        bits: Candidate bit-widths, from 1 to 8.
        granularity: What gets bits of its own: a whole ``"layer"``, or a ``"channel_group"``, up to 16 groups of
            output channels in each layer. Groups take a method whose costs were measured of them, such as ``"cet"``.
        rounding: ``"error_feedback"``, ``"nearest"``, or ``"long_axis"``: down or up such that the errors of all layers
            cancel along the steep directions, which the eigenpairs span; for ``quantizer="affine"``.
        quantizer: The values that weights may take: ``"affine"`` (evenly spaced), ``"codebook"``, ``"lq_nets"``,
            ``"abc_net"``, ``"series"`` or ``"dorefa"``.
        range: Where an affine grid begins and ends: ``"mse"``, ``"minmax"``, ``"percentile"``, ``"aciq"`` or
            ``"curvature"``.
        symmetry: Where the zero of an affine grid lies: ``"asymmetric"``, ``"symmetric"`` or ``"mid_rise"``.
        group_size: Weights along the input of a layer that share a scale and a zero point: 32, 64 or 128. ``None``
            gives each output channel one of both. Transposed convolutions have one a channel in any case.
        scale_dtype: Type that scales are stored in: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        runtime: What will execute the network: ``"onnxruntime"`` restricts grids of weights to what its integer kernels
            take, before anything is rounded, for ``export_onnx(integers="all")``; the report says what that costs.
            ``"any"`` restricts nothing.
        batchnorm: ``"recentre"`` moves the batch-norm statistics, and the biases of layers without batch-norm, by what
            quantization changed; ``"keep"`` leaves them.
        keep_zeros: Whether weights that are exactly zero, as after pruning, stay zero; for ``quantizer="affine"`` and
            ``"codebook"``. ``None`` keeps them in layers of which they are more than 20 %.
        objective: ``"distill"`` (KL divergence from the float outputs, no labels needed) or ``"task"`` (the loss).
        forward_fn: How the module is run: a function of it and a batch that returns its outputs, or the path that such
            a function is imported from; by default ``forward`` with the arguments that a batch fills.
        output: What outputs mean: ``"classes"`` (scores of a distribution), ``"values"`` (numbers, whose error counts
            relative to their own variance), a function that selects among what is returned, or ``"auto"``.
        class_axis: The axis of the outputs along which classes lie; found by itself as a rule.
        calibration_samples: Samples used to round weights and to repair statistics.
        curvature_samples: How many of these are used to measure curvature.
        eigenpairs: Eigenpairs of the Hessian to find where they come from Lanczos.
        compare: Methods to evaluate beside the chosen one at the same budget.
        guard: Whether uniform bits are taken instead if they are better on samples held out.
        study: Whether to compute what only explains the result: each layer's own error at the output, tightness at
            every bit-width, the share of the error in the steep directions, the spectral density and the loss
            landscape. It takes about as long again as measuring.
        time_budget: Seconds that measuring may take, as far as its estimate goes; ``None`` sets no limit.
        include: Shell patterns of the layers to quantize; all by default.
        exclude: Shell patterns of the layers to leave in float32.
        deployed: Names or shell patterns of the modules and parameters that make up the deployed network: what is
            quantized is theirs, and what is counted in sizes. By default all that a calibration batch reaches, which
            leaves out teachers, discriminators, averaged copies and networks of metrics.
        seed: Seed of every random number.

    Raises:
        OptionError: If a value is not allowed.
        BudgetError: If there is no budget, two, or one out of range.

    Example:
        >>> str(QuantizationOptions(avg_bits=3).budget)
        'avg_bits=3'
    """

    method: str = "cet"
    avg_bits: float | None = None
    ratio: float | None = None
    bops: float | None = None
    error: float | None = None
    max_bytes: float | None = None
    max_drop: float | None = None
    monitor: str | None = None
    monitor_mode: Literal["auto", "max", "min"] = "auto"
    max_evaluations: int = 8
    activation_bits: int | Literal["mixed"] | None = None
    coding: Literal["fixed", "entropy"] = "fixed"
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8)
    granularity: Literal["layer", "channel_group"] = "layer"
    rounding: Literal["nearest", "error_feedback", "long_axis"] = "error_feedback"
    quantizer: Literal["affine", "codebook", "lq_nets", "abc_net", "series", "dorefa"] = "affine"
    range: Literal["mse", "minmax", "percentile", "aciq", "curvature"] = "mse"
    symmetry: Literal["asymmetric", "symmetric", "mid_rise"] = "asymmetric"
    group_size: int | None = None
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    runtime: Literal["any", "onnxruntime"] = "any"
    batchnorm: Literal["recentre", "keep"] = "recentre"
    keep_zeros: bool | None = None
    objective: Literal["distill", "task"] = "distill"
    forward_fn: ForwardFunction | str | None = None
    output: Output = "auto"
    class_axis: int | None = None
    calibration_samples: int = 512
    curvature_samples: int = 256
    eigenpairs: int = 64
    compare: Sequence[str] = ("uniform",)
    guard: bool = True
    study: bool = False
    time_budget: float | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    deployed: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, available_methods())
        for name in _names("compare", self.compare):
            _one_of("compare", name, available_methods())
        for name, allowed in CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        self._check_quantizer()
        self._check_groups()
        bits = tuple(self.bits) if isinstance(self.bits, (list, tuple)) else ()
        if not bits or any(isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 8 for b in bits):
            raise OptionError(
                f"bits={self.bits!r} is not allowed; give whole numbers from 1 to 8, such as (2, 3, 4, 8)."
            )
        object.__setattr__(self, "bits", tuple(sorted(set(bits))))
        self._check_granularity()
        for name in ("calibration_samples", "curvature_samples", "eigenpairs", "max_evaluations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r} is not allowed; give a whole number from 1 up.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"seed={self.seed!r} is not allowed; give a whole number from 0 up.")
        _ = self.use
        self._check_inputs()
        self._check_coding()
        self._check_runtime()
        seconds = self.time_budget
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, Real) or not seconds > 0):
            raise OptionError(f"time_budget={seconds!r} is not allowed; give a number of seconds above 0.")
        for name in ("include", "exclude", "deployed"):
            if getattr(self, name) is not None:
                _names(name, getattr(self, name))
        self._check_reach()

    def _check_reach(self) -> None:
        """Refuse budgets that no network can meet, and those that the method does not know."""
        budget, least = self.budget, min(self.bits)
        if self.coding == "fixed" and self.ratio is not None and self.ratio > 32 / least:
            raise BudgetError(
                f"ratio={self.ratio:g} cannot be reached with bits={self.bits}: weights of {least} bits are at most "
                f"{32 / least:g} times smaller. Ask for less, or add smaller bit-widths."
            )
        if isinstance(budget, ErrorBudget):
            composing_method(self.method, budget)

    @property
    def values(self) -> Quantizer:
        """How the values are chosen that weights may take."""
        return Quantizer(
            self.quantizer,
            range=self.range,
            symmetry=self.symmetry if self.runtime == "any" else SIGNED_BYTE,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    @property
    def zeros_kept(self) -> bool | None:
        """``keep_zeros`` where the quantizer can hold the value zero; where it cannot, ``False``."""
        return self.keep_zeros if self.quantizer in _HOLD_ZERO else False

    def _check_quantizer(self) -> None:
        if self.keep_zeros not in (None, True, False):
            raise OptionError(f"keep_zeros={self.keep_zeros!r} is not allowed; give True, False or None.")
        if self.keep_zeros and self.quantizer not in _HOLD_ZERO:
            raise OptionError(
                f"keep_zeros=True is for quantizer='affine' or 'codebook'; the values of {self.quantizer!r} lie on "
                "either side of zero. Leave keep_zeros=None."
            )
        if self.quantizer == "affine":
            return
        if self.rounding == "long_axis":
            raise OptionError(
                f"rounding='long_axis' is for quantizer='affine'; with {self.quantizer!r} give 'nearest' or "
                "'error_feedback'."
            )
        for name, default in (
            ("range", "mse"),
            ("symmetry", "asymmetric"),
            ("granularity", "layer"),
            ("group_size", None),
            ("scale_dtype", "float32"),
        ):
            if getattr(self, name) != default:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is for quantizer='affine'; {self.quantizer!r} finds its values by "
                    f"itself. Leave {name}={default!r}."
                )

    def _check_groups(self) -> None:
        size = self.group_size
        if size is None:
            return
        if isinstance(size, bool) or size not in GROUP_SIZES:
            listed = ", ".join(map(str, GROUP_SIZES))
            raise OptionError(f"group_size={size!r} is not allowed; choose from {listed}, or None.")
        if self.granularity != "layer":
            raise OptionError(
                f"group_size={size} is for granularity='layer': weights that share a scale share their bits with all "
                "of the layer. Leave group_size=None, or granularity='layer'."
            )

    def _check_coding(self) -> None:
        if self.coding == "fixed":
            if self.max_bytes is not None:
                raise OptionError(
                    f"max_bytes={self.max_bytes!r} is for coding='entropy', which counts coded bytes; give that, or "
                    "avg_bits or ratio."
                )
            return
        for name, allowed in (
            ("granularity", "layer"),
            ("quantizer", "affine"),
            ("range", "mse"),
            ("symmetry", "asymmetric"),
            ("group_size", None),
            ("scale_dtype", "float32"),
            ("study", False),
            ("bops", None),
            ("error", None),
        ):
            if getattr(self, name) != allowed:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is for bit-widths, and coding='entropy' has steps; leave "
                    f"{name}={allowed!r}, or give coding='fixed'."
                )
        if self.rounding == "long_axis":
            raise OptionError("rounding='long_axis' is for coding='fixed'; give 'error_feedback' or 'nearest'.")
        for name in self.methods:
            check_continuous(name)

    def _check_runtime(self) -> None:
        if self.runtime == "any":
            return
        for name, allowed in (
            ("quantizer", "affine"),
            ("symmetry", "asymmetric"),
            ("coding", "fixed"),
            ("group_size", None),
        ):
            if getattr(self, name) != allowed:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} does not go with runtime={self.runtime!r}, which chooses grids of "
                    f"whole signed bytes; leave {name}={allowed!r}."
                )

    def _check_inputs(self) -> None:
        a = self.activation_bits
        if a != MIXED:
            if a is not None and (isinstance(a, bool) or not isinstance(a, int) or not 2 <= a <= 8):
                raise OptionError(
                    f"activation_bits={a!r} is not allowed; give a whole number from 2 to 8, 'mixed', or None."
                )
            return
        if self.bops is None:
            raise OptionError(
                "activation_bits='mixed' needs a budget of operations; give bops, such as bops=1.5, alone or with "
                "avg_bits or ratio."
            )
        if self.granularity != "layer":
            raise OptionError("activation_bits='mixed' needs granularity='layer'.")
        if max(self.bits) < 2:
            raise OptionError(f"activation_bits='mixed' takes its widths from bits={self.bits}; add one from 2 to 8.")
        for name in self.methods:
            check_mixed(name)

    def _check_granularity(self) -> None:
        if self.granularity == "layer":
            return
        if self.error is not None:
            raise OptionError("error= needs a method that composes errors of whole layers; leave granularity='layer'.")
        for name in self.methods:
            check_separable(name)

    @property
    def budget(self) -> Budget:
        """The one budget that was given."""
        return make_budget(
            bits=self.bits if self.coding == "fixed" else (),
            max_bytes=self.max_bytes,
            avg_bits=self.avg_bits,
            ratio=self.ratio,
            bops=self.bops,
            error=self.error,
            max_drop=self.max_drop,
            monitor=self.monitor,
        )

    def directed(self, direction: Callable[[str], Direction | None]) -> QuantizationOptions:
        """The options with the direction of the metric that ``max_drop`` watches settled.

        Args:
            direction: Whether more or less of a metric is better, by its name; ``None`` where nothing tells.

        Raises:
            OptionError: If nothing tells.

        Example:
            >>> from lightning_caq.utilities.metric_names import direction_of_name
            >>> options = QuantizationOptions(max_drop=0.1, monitor="val_loss")
            >>> options.directed(direction_of_name).monitor_mode
            'min'
        """
        if self.monitor is None or self.monitor_mode != "auto":
            return self
        mode = direction(self.monitor)
        if mode is None:
            raise OptionError(
                f"Nothing tells whether a good network has a large or a small {self.monitor!r}; give "
                "monitor_mode='max' or 'min'."
            )
        return replace(self, monitor_mode=mode)

    @property
    def reach(self) -> tuple[float, float]:
        """The fewest and the most average bits that weights may have."""
        return (min(self.bits), max(self.bits)) if self.coding == "fixed" else (_FEWEST, max(self.bits))

    @property
    def use(self) -> ModelUse:
        """How the module is run, and what its outputs mean."""
        return ModelUse(self.forward_fn, self.output, self.class_axis)

    @property
    def needs(self) -> frozenset[str]:
        """The measures that the methods and the report ask for."""
        groups = {"channel_groups"} if self.granularity == "channel_group" else set()
        studied = STUDIED if self.study else frozenset()
        inputs = OF_MIXED if self.activation_bits == MIXED else frozenset()
        errors = {"rounding_error"} if self.coding == "entropy" else set()
        return ALWAYS.union(errors, groups, studied, inputs, *(get_method(name).needs for name in self.methods))

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods that take part, each once: the chosen one, those to compare it with, and the guard."""
        return tuple(dict.fromkeys((self.method, *self.compare, *(("uniform",) if self.guard else ()))))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for reports and loggers.

        Example:
            >>> QuantizationOptions(avg_bits=3, bits=(2, 4)).to_dict()["bits"]
            [2, 4]
        """
        return {name: plain(x) for name, x in asdict(self).items()}


def plain(value: Any) -> Any:
    """An option as a plain value, a function as where it comes from."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return list(value) if isinstance(value, tuple) else value


CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(QuantizationOptions).items() if get_origin(hint) is Literal
}
"""Option to the values it may have, of the options that are one of a few names."""


def _one_of(option: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(f"{option}={value!r} is not known; choose from {', '.join(repr(a) for a in allowed)}.")


def _names(option: str, value: Any) -> Sequence[str]:
    if isinstance(value, str):
        raise OptionError(f"{option}={value!r} must be a list of strings, such as [{value!r}].")
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise OptionError(f"{option}={value!r} must be a list of strings.")
    return tuple(value)
