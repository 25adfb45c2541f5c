"""Composition: the error of a whole network from the errors of its layers (CAQ 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_caq.errors import OptionError


@dataclass(frozen=True)
class Composition:
    """The error at the network's output, in the unit of that output.

    Attributes:
        terms: A_i e_i, what each layer's error is at the network's output, in the order of the layers.
        input_term: A_0 ε_0, what the input's error is there.
    """

    terms: tuple[float, ...]
    input_term: float = 0.0

    @property
    def bound(self) -> float:
        """Φ = A_0 ε_0 + Σ A_i e_i: the errors all point the same way (triangle inequality)."""
        return self.input_term + sum(self.terms)

    @property
    def rss(self) -> float:
        """Φ_rss = (Σ (A_i e_i)²)^½ with the input's term among them: independent errors, an estimate and no bound."""
        return float(np.linalg.norm([self.input_term, *self.terms]))


def compose(
    amplifications: Sequence[float],
    errors: Sequence[float],
    *,
    input_amplification: float = 0.0,
    input_error: float = 0.0,
) -> Composition:
    """Carry every layer's error to the network's output (CAQ 2.3).

    For a chain f_k ∘ … ∘ f_1 with A_i = ∏_{j>i} L_j the bound is the proposal's Φ_F(ε_0). With A_i from the Jacobian it
    holds to first order in the errors; with Lipschitz constants beyond that, as far as these hold for the network
    that the errors are carried through.

    Args:
        amplifications: A_i, from layer i's output to the network's output; out/out.
        errors: e_i, the error of layer i's output; out.
        input_amplification: A_0, from the network's input to its output; out/in.
        input_error: ε_0, the error of the network's input; in.

    Returns:
        The terms, their sum and their root sum of squares.

    Raises:
        OptionError: If the lengths differ, or a number is negative or not finite.

    Example:
        >>> composed = compose([6.0, 2.0], [0.5, 2.0], input_amplification=10.0, input_error=0.1)
        >>> composed.terms, composed.bound, round(composed.rss, 3)
        ((3.0, 4.0), 8.0, 5.099)
    """
    if len(amplifications) != len(errors):
        raise OptionError(f"{len(amplifications)} amplifications and {len(errors)} errors; give one of each a layer.")
    gains = _checked("amplifications", [*amplifications, input_amplification])
    sizes = _checked("errors", [*errors, input_error])
    *terms, input_term = (gains * sizes).tolist()
    return Composition(tuple(terms), input_term)


def correlated_bound(gram: ArrayLike) -> float:
    """Φ_corr = (Σ_ij |G_ij|)^½, a bound that knows how far the layers' errors are aligned, but not with which sign.

    G_ij is the mean inner product of what the errors of layers i and j are at the output; (Σ_ij G_ij)^½ is their sum
    with its signs. As |G_ij| ≤ (G_ii G_jj)^½, Φ_rss ≤ Φ_corr ≤ Φ: the first where errors are uncorrelated, the second
    where they are parallel. A sum of norms over k layers exceeds uncorrelated errors by up to √k, this does not.

    Args:
        gram: G, symmetric, of shape (k, k); out².

    Raises:
        OptionError: If a number is not finite.

    Example:
        >>> correlated_bound([[4.0, -2.0], [-2.0, 9.0]]) ** 2  # signed: 9; rss: 13; parallel: 25
        17.0
    """
    total = float(np.abs(np.asarray(gram, dtype=np.float64)).sum())
    if not np.isfinite(total):
        raise OptionError("gram holds NaN or infinite numbers; only finite ones are allowed.")
    return float(np.sqrt(total))


def layer_error_bound(
    bits: Sequence[float], *, lipschitz: ArrayLike, input_norm: ArrayLike, output_norm: ArrayLike, remainder: ArrayLike
) -> NDArray[np.float64]:
    """ε_i(p) = (L_i ‖z_i‖ + ‖f_i(z_i)‖) 2^−p + ρ_i ‖z_i‖² 2^−2p, a bound on the error of a layer's output (CAQ 2.2).

    Input and output are stored with p bits, a relative error of 2^−p each. The proposal prints the bound with ≥, its
    proof gives ≤: this is how large the error can be, so a p at which it is small enough suffices.

    Args:
        bits: Precisions p, |B| of them; bit.
        lipschitz: L_i, one a layer; out/in.
        input_norm: ‖z_i‖, one a layer; in.
        output_norm: ‖f_i(z_i)‖, one a layer; out.
        remainder: ρ_i, half the largest second derivative of f_i, one a layer; out/in².

    Returns:
        ε[i, p] of shape (k, |B|); out.

    Raises:
        OptionError: If a number is negative or not finite.

    Example:
        >>> layer_error_bound([1, 2], lipschitz=[2.0], input_norm=[3.0], output_norm=[4.0], remainder=[0.5])
        array([[6.125 , 2.78125]])
    """
    stretch, z = _checked("lipschitz", lipschitz), _checked("input_norm", input_norm)
    linear = stretch * z + _checked("output_norm", output_norm)
    relative = 2.0 ** -_checked("bits", bits)
    curved: NDArray[np.float64] = np.outer(linear, relative)
    return curved + np.outer(_checked("remainder", remainder) * z**2, relative**2)


def precision_floor(remainder: ArrayLike, diameter: ArrayLike, error: float) -> NDArray[np.float64]:
    """p*_i = ½ log₂(ρ_i diam(Ω_i)² / ε): bits below which the curved part of the error alone exceeds ε (CAQ 2.2).

    Args:
        remainder: ρ_i, one a layer; out/in².
        diameter: diam(Ω_i), one a layer; in.
        error: ε, the error of the layer's output that is tolerated, above 0; out.

    Returns:
        p*_i of shape (k,), bit; 0 where the formula gives less, as for a layer without curvature.

    Raises:
        OptionError: If ε is not above 0, or another number is negative or not finite.

    Example:
        >>> precision_floor([4.0, 0.0], [8.0, 8.0], error=1.0)
        array([4., 0.])
    """
    if not error > 0:
        raise OptionError(f"error={error!r} is not allowed; give a tolerated error above 0.")
    ratio = _checked("remainder", remainder) * _checked("diameter", diameter) ** 2 / error
    floors: NDArray[np.float64] = 0.5 * np.log2(np.maximum(ratio, 1.0))
    return floors


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        where, what = int(wrong[0]), array.flat[wrong[0]]
        raise OptionError(f"{name}: entry {where} is {what}; only finite numbers of at least 0 are allowed.")
    return array
