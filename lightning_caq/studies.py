"""Studies: what evaluation finds out about a run, as plain numbers that a report holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReason:
    """Why a layer has its bits: what its method predicts of it at these bits, and a width below and above.

    Attributes:
        name: The layer.
        method: The method whose predictions they are.
        unit: Their unit, such as ``"nat"``.
        bits: The layer's bits, on average where its channels differ.
        fewer: The width below, ``None`` if the bits are the smallest.
        more: The width above, ``None`` if they are the largest.
        damage: Predicted damage at the layer's bits; ``None`` where a method predicts none of single layers.
        damage_fewer: Predicted damage at the width below.
        damage_more: Predicted damage at the width above.
        weights: Number of weights.
        source: ``"measured"``, on the network with only this layer rounded, ``"modelled"``, ``"partly measured"`` where
            groups of channels differ in that, or ``"searched"`` and ``"uniform"`` where no layer was looked at alone.
    """

    name: str
    method: str
    unit: str
    bits: float
    fewer: float | None
    more: float | None
    damage: float | None
    damage_fewer: float | None
    damage_more: float | None
    weights: int
    source: str

    @property
    def bought(self) -> float | None:
        """Damage that the last step to the layer's bits took away, for each kilobyte that it added.

        Example:
            >>> reason = LayerReason("fc", "cet", "nat", 3, 2, 4, 1.0, 5.0, 0.5, 8000, "modelled")
            >>> reason.bought, reason.next  # a bit of each weight is 1 kB
            (4.0, 0.5)
        """
        return self._rate(self.fewer, self.bits, self.damage_fewer, self.damage)

    @property
    def next(self) -> float | None:
        """Damage that the next step would take away, for each kilobyte that it would add."""
        return self._rate(self.bits, self.more, self.damage, self.damage_more)

    def _rate(self, low: float | None, high: float | None, before: float | None, after: float | None) -> float | None:
        if low is None or high is None or before is None or after is None:
            return None
        return (before - after) / (self.weights * (high - low) / 8000)


@dataclass(frozen=True)
class LayerRate:
    """One layer's rate and its limit.

    Attributes:
        name: The layer.
        weights: Number of weights.
        bits: Bits a weight that are stored.
        limit: Bits a weight of Shannon's lower bound at the layer's distortion.
        distortion: Mean squared error a weight that it is taken at.
    """

    name: str
    weights: int
    bits: float
    limit: float
    distortion: float

    @property
    def gap(self) -> float:
        """Bits a weight above the limit."""
        return self.bits - self.limit


@dataclass(frozen=True)
class RatePoint:
    """A network that was tried on the way to a size.

    Attributes:
        bits: Bits a weight of its codes.
        output_error: Its output error on the samples held out, a part of the output, before any repair.
    """

    bits: float
    output_error: float


@dataclass(frozen=True)
class RateLimit:
    """A network's rate and its limit.

    Attributes:
        layers: One entry a layer, in order of execution.
        tried: The networks that were tried on the way to it with the same method, those of other sizes too.
    """

    layers: tuple[LayerRate, ...]
    tried: tuple[RatePoint, ...] = ()

    @property
    def bits(self) -> float:
        """Bits a weight that are stored."""
        return self._mean([x.bits for x in self.layers])

    @property
    def limit(self) -> float:
        """Bits a weight of the bound."""
        return self._mean([x.limit for x in self.layers])

    @property
    def gap(self) -> float:
        """Bits a weight above the bound."""
        return self.bits - self.limit

    def limit_at(self, share: float) -> float:
        """Bits a weight of the bound where every layer has this many times its squared error.

        Layers whose bound is zero stay there, so that it is a bound below ``share`` = 1 too.
        """
        octaves = 0.5 * math.log2(share)
        return self._mean([max(x.limit - octaves, 0.0) if x.limit > 0 else 0.0 for x in self.layers])

    def _mean(self, values: Sequence[float]) -> float:
        total = sum(x.weights for x in self.layers)
        return sum(x.weights * value for x, value in zip(self.layers, values, strict=True)) / max(total, 1)


@dataclass(frozen=True)
class Tightness:
    """Output errors, observed and predicted, all in the unit of the network's output.

    Attributes:
        observed: Root mean square over samples of ‖F_q(x) − F(x)‖, F_q with every weight rounded to nearest and the
            mean of its error taken out of each layer's output that can be corrected.
        bound: Φ, root mean square over samples of Σ_i ‖J_i u_i‖: the layers' errors all point the same way. Taken
            sample by sample the triangle inequality is sharper than Σ A_i e_i, the sum that bits are chosen by.
        correlated: Φ_corr = (Σ_ij |G_ij|)^½, the same with the alignment that the errors really have, at its worst
            signs.
        rss: Φ_rss = (Σ (A_i e_i)²)^½ with A_i from the Jacobian: the layers' errors are independent.
        linear: Root mean square of ‖Σ_i J_i u_i‖, the first-order error with its signs.
        lipschitz: Φ with A_i from Lipschitz constants; ``None`` where they were not measured.
    """

    observed: float
    bound: float
    correlated: float
    rss: float
    linear: float
    lipschitz: float | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted over observed, of each prediction there is; 1 is exact.

        Example:
            >>> Tightness(observed=2.0, bound=5.0, correlated=3.0, rss=1.8, linear=2.2).ratios
            {'bound': 2.5, 'correlated': 1.5, 'rss': 0.9, 'linear': 1.1}
        """
        names = ("bound", "correlated", "rss", "linear", "lipschitz")
        predicted = {name: getattr(self, name) for name in names}
        return {name: _ratio(value, self.observed) for name, value in predicted.items() if value is not None}


def _ratio(predicted: float, observed: float) -> float:
    if observed > 0:
        return predicted / observed
    return 1.0 if predicted == 0 else float("inf")


@dataclass(frozen=True)
class Energy:
    """½ ΔᵀHΔ of one layer's rounding error, split by the short-axis subspace S; nat.

    Attributes:
        short: The part in S, ½ Σ_j |λ_j| (v_jᵀΔ)².
        rest: All else, ½ ΔᵀHΔ less the part in S; it may be negative for an indefinite H.
    """

    short: float
    rest: float

    @property
    def share(self) -> float | None:
        """Share of S in both parts' magnitudes; ``None`` where both are zero or not numbers.

        Example:
            >>> Energy(3.0, 1.0).share
            0.75
        """
        total = abs(self.short) + abs(self.rest)
        return abs(self.short) / total if total > 0 else None


@dataclass(frozen=True)
class Landscape:
    """The loss on a grid over a plane. All lengths are in the unit of the weights.

    Attributes:
        short: Places along the short axis, s_1, …, s_p.
        long: Places along the long axis, t_1, …, t_q.
        loss: q rows of p values: ℓ(w + s u + t v) − ℓ(w), nat.
        curvatures: uᵀHu and vᵀHv, nat/weight²: of the short and of the long axis.
        path: (s, t) of the weights as one layer after the other is rounded, projected on the plane; from (0, 0).
        off_plane: Length of the whole rounding error that lies outside the plane, as a share of it.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    curvatures: tuple[float, float]
    path: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    off_plane: float = 0.0


@dataclass(frozen=True)
class SweepPoint:
    """One quantized network, or the mean of several that differ in their seed only.

    Attributes:
        method: How it was quantized; points of one method are one curve.
        avg_bits: Average bits a quantized weight, scales not counted.
        ratio: Float32 size over quantized size, scales, zero points and excluded layers counted.
        metrics: Metric to value, such as ``"val_acc"``.
        stderr: Metric to the standard error of the mean over seeds; empty for a single network.
        eigenpairs: Eigenpairs that spanned the short-axis subspace S; 0 where that was not noted.
        chosen: Whether it is the network that the plan is for.
    """

    method: str
    avg_bits: float
    ratio: float
    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    eigenpairs: int = 0
    chosen: bool = False


@dataclass(frozen=True)
class EpochCurvature:
    """What was measured of every layer in one epoch of training.

    Attributes:
        epoch: The epoch, counted from 0.
        figures: ``<measure>/<layer>`` to value; the measures are ``kappa`` (out²/in²), ``lipschitz`` (out/in),
            ``trace`` and ``top_eigenvalue`` (both nat/weight²).
    """

    epoch: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Studies:
    """What was studied; all of it is optional, and empty where it was not.

    Attributes:
        alone: Layer name to the observed error of the network's output with only this layer rounded to nearest at its
            bit-width; root mean square over samples, in the unit of the output.
        energies: Layer name to the energy of the rounding error that the plan makes.
        tightness: Bit-width to predicted and observed output errors with every layer rounded to nearest at it.
        landscape: The loss on a plane of a short and a long axis.
        points: Networks quantized under other budgets, methods or seeds.
        eigenpairs: The network quantized with other numbers of eigenpairs.
        training: The curvature of every layer, epoch by epoch.
    """

    alone: dict[str, float] = field(default_factory=dict)
    energies: dict[str, Energy] = field(default_factory=dict)
    tightness: dict[int, Tightness] = field(default_factory=dict)
    landscape: Landscape | None = None
    points: tuple[SweepPoint, ...] = ()
    eigenpairs: tuple[SweepPoint, ...] = ()
    training: tuple[EpochCurvature, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Studies:
        """The studies that ``dataclasses.asdict`` and a round through JSON made plain.

        Example:
            >>> import json
            >>> from dataclasses import asdict
            >>> studies = Studies({"fc": 0.5}, {"fc": Energy(1.0, 2.0)}, {3: Tightness(1.0, 2.0, 1.7, 1.5, 1.1)})
            >>> Studies.from_dict(json.loads(json.dumps(asdict(studies)))) == studies
            True
        """
        plane_ = data["landscape"]
        return cls(
            alone=dict(data["alone"]),
            energies={name: Energy(**each) for name, each in data["energies"].items()},
            tightness={int(bits): Tightness(**each) for bits, each in data["tightness"].items()},
            landscape=None if plane_ is None else Landscape(**{key: _tuples(x) for key, x in plane_.items()}),
            points=tuple(SweepPoint(**point) for point in data["points"]),
            eigenpairs=tuple(SweepPoint(**point) for point in data["eigenpairs"]),
            training=tuple(EpochCurvature(**each) for each in data.get("training", ())),
        )


def _tuples(value: Any) -> Any:
    """Lists, which is what JSON has, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
