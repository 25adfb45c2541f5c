"""The curvature profile: everything that was measured, one row a layer, as plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from lightning_caq.sizes import Width


@dataclass(frozen=True)
class LayerCurvature:
    """What was measured of one layer. A figure that was not asked for is ``None`` (or an empty dict).

    Attributes:
        name: The layer.
        weights: n_i, number of weights.
        channels: Number of scales.
        macs: m_i, multiply–accumulates a sample.
        kappa: κ_i, second-order sensitivity: largest operator norm of ∇²‖f_i(z)‖² over samples; out²/in².
        kappa_tolerance: Relative change of κ_i in the last step of its iteration.
        lipschitz: L_i, σ_max of the layer's linear operator times the Lipschitz constants of what follows; out/in.
        lipschitz_tolerance: Relative residual of σ_max²: an eigenvalue of WᵀW lies that close.
        kappa_mean: The proposal's estimator of κ_i, the mean of ‖H v‖ / ‖v‖ over Rademacher vectors; biased low.
        kappa_mean_stderr: Its standard error.
        local_lipschitz: Largest Jacobian norm of the layer and what follows it on the samples; a lower bound; out/in.
        local_lipschitz_tolerance: Relative change in the last step of its iteration.
        input_norm: Root mean square over samples of ‖z_i‖.
        output_norm: Root mean square over samples of ‖f_i(z_i)‖, on the first batch.
        diameter: Twice the largest distance of an input from the mean input, on the first batch.
        remainder: ρ_i, second difference of f_i at the radius of the rounding error; out/in².
        trace: tr(H_ii) of the objective, nat/weight².
        trace_stderr: Its standard error, of random probes (``task``) or of drawn rows; 0 where the trace is exact.
        gradient_norm: ‖g_i‖ of the objective, nat/weight.
        score_norm: For ``distill``, root mean square of ‖∇ log p(y)‖ over samples and labels y drawn from the network's
            own outputs p, √tr(H_ii), nat/weight; ``None`` for ``task``.
        top_eigenvalue: Eigenvalue of H_ii of largest magnitude, nat/weight².
        top_eigenvalue_residual: Some eigenvalue lies this close to it.
        diagonal_energy: Bits to Σ_j D_jj Δ_j², D the diagonal of the Gauss–Newton (``distill``) or the empirical Fisher
            matrix (``task``).
        rounding_error: Bits to ‖Δ_i(b)‖², with nearest rounding.
        weight_range: Root mean square over output channels of the range of the weights, max − min.
        kl: Bits to KL(float ‖ only this layer rounded to nearest) of the outputs, nat.
        distribution_distance: Bits to the Jensen–Shannon divergence between histograms of the float and the rounded
            weights, nat.
        scale_importance: Bits to the learned scale of a quantizer of that bit-width, in the unit of the weights.
        output_error: Bits to e_i(b), the root mean square over samples of ‖Δ_i(b) z_i‖.
        amplification: A_i, the gain from the layer's output error to the network's output error.
        carried_error: Bits to A_i(b) e_i(b), the root mean square of ‖J_i Δ_i(b) z_i‖: the layer's error at the
            network's output, along the error of that very bit-width.
        lipschitz_amplification: A_i as a bound, products of Lipschitz constants along paths, summed over paths.
        subspace_curvature: Σ_j |λ_j| ‖v_j restricted to the layer‖², the curvature in the short-axis subspace S.
        subspace_energy: Bits to Σ_j |λ_j| (v_jᵀ Δ_i(b))², the energy of the real rounding error in S.
        second_order: Bits to Δ_i(b)ᵀ H_ii Δ_i(b), signed: from every eigenpair for ``distill``; for ``task`` from those
            in S, and μ ‖Δ‖² for the rest.
        first_order: Bits to gᵀΔ_i(b), the first-order change of the loss; zeros for ``distill``.
        loss_change: Bits to the loss change measured with only this layer rounded to nearest, ℓ(w + Δ_i) − ℓ(w).
        activation_cost: Bits to the loss change measured with only the layer's input rounded, nat; 0 where it takes
            no floating-point numbers.
        outside: Bit-widths at which the quadratic model fails (CET Eq. 7): its prediction is off by more than the
            tolerance from ``loss_change``.
        groups: Groups of its output channels, each with figures of its own; empty where they were not asked for.
        extra: Figures of registered measures that have no field here: name to a number, or to one a bit-width.
    """

    name: str
    weights: int
    channels: int
    macs: int
    kappa: float | None = None
    kappa_tolerance: float | None = None
    lipschitz: float | None = None
    lipschitz_tolerance: float | None = None
    kappa_mean: float | None = None
    kappa_mean_stderr: float | None = None
    local_lipschitz: float | None = None
    local_lipschitz_tolerance: float | None = None
    input_norm: float | None = None
    output_norm: float | None = None
    diameter: float | None = None
    remainder: float | None = None
    trace: float | None = None
    trace_stderr: float | None = None
    gradient_norm: float | None = None
    score_norm: float | None = None
    top_eigenvalue: float | None = None
    top_eigenvalue_residual: float | None = None
    diagonal_energy: dict[int, float] = field(default_factory=dict)
    rounding_error: dict[int, float] = field(default_factory=dict)
    weight_range: float | None = None
    kl: dict[int, float] = field(default_factory=dict)
    distribution_distance: dict[int, float] = field(default_factory=dict)
    scale_importance: dict[int, float] = field(default_factory=dict)
    output_error: dict[int, float] = field(default_factory=dict)
    amplification: float | None = None
    carried_error: dict[int, float] = field(default_factory=dict)
    lipschitz_amplification: float | None = None
    subspace_curvature: float | None = None
    subspace_energy: dict[int, float] = field(default_factory=dict)
    second_order: dict[int, float] = field(default_factory=dict)
    first_order: dict[int, float] = field(default_factory=dict)
    loss_change: dict[int, float] = field(default_factory=dict)
    activation_cost: dict[int, float] = field(default_factory=dict)
    outside: tuple[int, ...] = ()
    groups: tuple[ChannelGroup, ...] = ()
    extra: dict[str, float | dict[int, float]] = field(default_factory=dict)

    @property
    def validity_radius(self) -> float | None:
        """‖Δ_i‖ at the smallest bit-width at which the quadratic model was seen to hold; ``None`` if at none."""
        inside = [b for b in sorted(self.loss_change) if b not in self.outside]
        return self.rounding_error[inside[0]] ** 0.5 if inside else None

    def figure(self, name: str) -> Any:
        """A figure by its name, a field or one of ``extra``; ``None`` where it was not measured.

        Example:
            >>> row = LayerCurvature("fc", 8, 2, 8, trace=1.0, extra={"fan_out": 2.0})
            >>> row.figure("trace"), row.figure("fan_out"), row.figure("fan_in")
            (1.0, 2.0, None)
        """
        return getattr(self, name) if name in _FIELDS else self.extra.get(name)


_FIELDS = frozenset(f.name for f in fields(LayerCurvature))


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels of a layer that share their bits, as if they were a layer.

    Attributes:
        channels: Their places along the layer's axis of output channels.
        row: What was measured of them: ``rounding_error``, ``diagonal_energy``, ``second_order``, ``subspace_energy``,
            ``first_order``, ``loss_change`` and ``outside`` of the layer's error at these channels alone; ``trace`` and
            ``subspace_curvature``, the layer's, shared out by the diagonal of the objective's curvature.
    """

    channels: tuple[int, ...]
    row: LayerCurvature


@dataclass(frozen=True)
class CurvatureProfile:
    """The measured network.

    Attributes:
        layers: One row a layer, in order of execution.
        objective: The calibration objective, ``"distill"`` or ``"task"``.
        samples: Samples that curvature was measured on.
        seed: Seed of the random probes.
        eigenvalues: λ_1, …, λ_m of the objective's Hessian, by magnitude; they span the short-axis subspace S.
        trace: tr(H) over all layers, or ``None``.
        residual_curvature: μ, the mean curvature outside S, floored at 0.
        seconds: Time it took.
        eigenvalue_residuals: For ``task``, ‖H v_j − λ_j v_j‖ of each pair; within 1e-3 |λ_j| where Lanczos converged.
        kept: Share of the outputs' curvature in the rows that the spectrum was computed from; 1 for ``task``.
        sampled: Rows drawn and rows that there were, where there were too many to compute all; otherwise ``None``.
        density: Spectral density of the objective's Hessian: a grid of values, nat/weight², and the density at them,
            weight²/nat, which integrates to 1.
        density_stderr: Its standard errors at the grid, over random probes.
        needs: The measures that were asked for.
        fingerprint: Of the weights, the samples and the settings that it holds for.
        input_lipschitz: A_0, the bound on the gain from the network's input to its output; out/in.
        quantizer: The values that the rounding errors are errors from, a name of ``values.QUANTIZERS``.
        range: Where they begin and end, of an affine grid.
        symmetry: Where their zero lies, of an affine grid.
        group_size: Weights of a channel that share a scale, of an affine grid; ``None`` where all do.
        scale_dtype: Name of the type of scales, of an affine grid.
    """

    layers: tuple[LayerCurvature, ...]
    objective: str = "distill"
    samples: int = 0
    seed: int = 0
    eigenvalues: tuple[float, ...] = ()
    trace: float | None = None
    residual_curvature: float | None = None
    seconds: float = 0.0
    kept: float = 1.0
    sampled: tuple[int, int] | None = None
    density: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    density_stderr: tuple[float, ...] = ()
    eigenvalue_residuals: tuple[float, ...] = ()
    needs: tuple[str, ...] = ()
    fingerprint: str = ""
    input_lipschitz: float | None = None
    quantizer: str = "affine"
    range: str = "mse"
    symmetry: str = "asymmetric"
    group_size: int | None = None
    scale_dtype: str = "float32"

    def __getitem__(self, name: str) -> LayerCurvature:
        """The row of the layer called ``name``."""
        return self._rows[name]

    @cached_property
    def _rows(self) -> dict[str, LayerCurvature]:
        return {row.name: row for row in self.layers}

    @property
    def shape(self) -> str:
        """What the quadratic form is: an ellipsoid (all λ > 0) or a hyperbolic paraboloid (mixed signs; CET §3.2)."""
        if not self.eigenvalues:
            return "not measured"
        # A computed zero eigenvalue carries rounding noise of either sign; noise is not a direction of descent.
        floor = 1e-6 * max(abs(x) for x in self.eigenvalues)
        return "hyperbolic paraboloid" if any(x < -floor for x in self.eigenvalues) else "ellipsoid"

    @property
    def converged(self) -> tuple[bool, ...]:
        """Of each eigenpair whether its residual is within 1e-3 |λ_j| or rounding noise; the Gram route is exact."""
        if not self.eigenvalue_residuals:
            return (True,) * len(self.eigenvalues)
        noise = 1e-6 * max(abs(x) for x in self.eigenvalues)
        pairs = zip(self.eigenvalue_residuals, self.eigenvalues, strict=True)
        return tuple(residual <= max(1e-3 * abs(value), noise) for residual, value in pairs)

    def with_rows(self, fill: Callable[[LayerCurvature], LayerCurvature]) -> CurvatureProfile:
        """The profile with other rows in place of its own, each made from one of them."""
        return replace(self, layers=tuple(map(fill, self.layers)))

    def by_group(self) -> CurvatureProfile:
        """The profile with a row for each group of channels in place of one for each layer."""
        return replace(self, layers=tuple(group.row for row in self.layers for group in row.groups))

    def predicted_change(self, name: str, bits: Width) -> float | None:
        """Loss change with one layer rounded, nat: the quadratic model's, or the measured one outside its range.

        gᵀΔ + ½ ΔᵀHΔ (CET Eq. 7); ``None`` where it was not measured. Where channels differ in their bits it is the sum
        over their groups.
        """
        row = self[name]
        if isinstance(bits, int):
            return _predicted(row, bits)
        return _total([_predicted(group.row, bits[group.channels[0]]) for group in row.groups] or [None])

    def predicted_loss(self, bits: Mapping[str, Width]) -> float | None:
        """Loss change of a whole network, the sum over layers; ``None`` where it was not measured."""
        return _total([self.predicted_change(name, b) for name, b in bits.items()])

    def to_json(self) -> str:
        """The profile as JSON text.

        Example:
            >>> profile = CurvatureProfile((LayerCurvature("fc", 10, 2, 10, rounding_error={2: 0.5}),))
            >>> CurvatureProfile.from_json(profile.to_json()) == profile
            True
        """
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CurvatureProfile:
        """The profile that ``to_json`` wrote."""
        data = json.loads(text)
        rows = tuple(_row(item) for item in data.pop("layers"))
        return cls(layers=rows, **{name: _as_tuple(value) for name, value in data.items()})


def _predicted(row: LayerCurvature, bits: int) -> float | None:
    if bits in row.outside:
        return row.loss_change[bits]
    if bits not in row.second_order:
        return None
    return row.first_order.get(bits, 0.0) + 0.5 * row.second_order[bits]


def _total(changes: Sequence[float | None]) -> float | None:
    """The sum; ``None`` where a part was not measured."""
    known = [x for x in changes if x is not None]
    return sum(known) if len(known) == len(changes) else None


def _as_tuple(value: Any) -> Any:
    """JSON's lists as tuples, nested ones too."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _row(item: dict[str, Any]) -> LayerCurvature:
    values = {k: v for k, v in item.items() if k in _FIELDS}
    for name in (f.name for f in fields(LayerCurvature) if f.default_factory is dict and f.name != "extra"):
        values[name] = _by_bits(values.get(name, {}))
    extra = values.get("extra", {})
    values["extra"] = {name: _by_bits(x) if isinstance(x, dict) else x for name, x in extra.items()}
    values["outside"] = tuple(values["outside"])
    values["groups"] = tuple(ChannelGroup(tuple(x["channels"]), _row(x["row"])) for x in values.get("groups", ()))
    return LayerCurvature(**values)


def _by_bits(table: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys as whole numbers."""
    return {int(bits): value for bits, value in table.items()}
