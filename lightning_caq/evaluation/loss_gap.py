"""The loss gap: what rounding one layer does to the loss, against what the quadratic model says (CET Eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_caq.profile import CurvatureProfile


@dataclass(frozen=True)
class LossGap:
    """One layer rounded to nearest at one bit-width, all other layers in float.

    Attributes:
        name: The layer.
        bits: The bit-width b.
        distance: ‖Δ_i(b)‖, how far the weights moved, in their unit.
        predicted: gᵀΔ + ½ ΔᵀHΔ, nat; ``None`` where it was not computed.
        actual: ℓ(w + Δ) − ℓ(w), nat; ``None`` where it was not measured, because the quadratic model was seen to hold
            at fewer bits already.
        outside: Whether the quadratic model was seen to fail here.
    """

    name: str
    bits: int
    distance: float
    predicted: float | None
    actual: float | None
    outside: bool

    @property
    def gap(self) -> float | None:
        """|actual − predicted|, nat; ``None`` where either is unknown."""
        return None if self.actual is None or self.predicted is None else abs(self.actual - self.predicted)


def loss_gaps(profile: CurvatureProfile) -> tuple[LossGap, ...]:
    """Every layer and bit-width whose rounding error was measured, layers in order, bits upwards.

    Costs nothing: all of it is in the profile (measure ``loss_change``).

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 8, 2, 8, rounding_error={2: 4.0}, second_order={2: 1.0}, loss_change={2: 0.75})
        >>> [(g.distance, g.predicted, g.actual, g.gap) for g in loss_gaps(CurvatureProfile((row,)))]
        [(2.0, 0.5, 0.75, 0.25)]
    """
    return tuple(
        LossGap(
            name=row.name,
            bits=bits,
            distance=error**0.5,
            predicted=row.first_order.get(bits, 0.0) + 0.5 * row.second_order[bits]
            if bits in row.second_order
            else None,
            actual=row.loss_change.get(bits),
            outside=bits in row.outside,
        )
        for row in profile.layers
        for bits, error in sorted(row.rounding_error.items())
    )
