"""The quadratic model: what a change of all weights together does to the objective, near the float weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FLOOR = 1e-3
_CHUNK = 2**16  # weights at a time in float64, so that no second copy of the eigenvectors is made


@dataclass(frozen=True)
class QuadraticModel:
    """ℓ(w + Δ) − ℓ(w) ≈ gᵀΔ + ½ Σ_j λ_j (v_jᵀΔ)² + ½ μ ‖Δ‖² over the n weights of all layers, one after another (CET).

    Attributes:
        sizes: Number of weights of each layer, n_i.
        values: λ_1, …, λ_k with |λ| descending, shape (k,), float64.
        vectors: v_1, …, v_k as columns, shape (n, k), float32; they span the short-axis subspace S.
        residual: μ, the mean curvature outside S, not negative.
        gradient: g, shape (n,), float32.
    """

    sizes: tuple[int, ...]
    values: Tensor
    vectors: Tensor
    residual: float
    gradient: Tensor

    @property
    def stiffness(self) -> float:
        """What ‖Δ‖² costs: μ, or a thousandth of the mean |λ| a weight where that is more; never nothing."""
        return max(self.residual, _FLOOR * float(self.values.abs().sum()) / len(self.vectors))

    def along(self, delta: Tensor) -> Tensor:
        """Vᵀ Δ, shape (k,), float64.

        Args:
            delta: Δ, shape (n,).
        """
        parts = zip(self.vectors.split(_CHUNK), delta.split(_CHUNK), strict=True)
        return torch.stack([v.double().T @ d.double() for v, d in parts]).sum(0)

    def change(self, delta: Tensor) -> float:
        """The change of the objective that the model predicts, nat.

        Args:
            delta: Δ, shape (n,).

        Example:
            >>> one = QuadraticModel((2,), torch.tensor([3.0]), torch.tensor([[1.0], [0.0]]), 0.5, torch.zeros(2))
            >>> one.change(torch.tensor([1.0, 2.0]))  # ½ (3 · 1² + 0.5 · 5)
            2.75
        """
        d = delta.double()
        rest = float(self.gradient.double() @ d) + 0.5 * self.residual * float(d @ d)
        return rest + 0.5 * float(self.values.double() @ self.along(d).square())

    def steep_energy(self, delta: Tensor) -> float:
        """Σ_j |λ_j| (v_jᵀΔ)², the energy of a change in S, nat.

        Args:
            delta: Δ, shape (n,).
        """
        return float(self.values.double().abs() @ self.along(delta).square())

    def stiffened(self, factor: float) -> QuadraticModel:
        """The model with a higher price on ‖Δ‖², which keeps its best change closer to zero (Marquardt 1963)."""
        return replace(self, residual=factor * self.stiffness)

    def convex(self) -> QuadraticModel:
        """The model without what promises a gain: |λ| in place of λ, and no gradient. No change is best."""
        return replace(self, values=self.values.abs(), gradient=torch.zeros_like(self.gradient))
