"""Eigenpairs: what a profile would say, had other numbers of them spanned the short-axis subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs, residual_curvature
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.profile import CurvatureProfile

COUNTS = (5, 20, 50, 100, 200, 500)  # the last four are those of CET's figure 3


def profiles_by_eigenpairs(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    deltas: Mapping[str, Mapping[int, Tensor]],
    profile: CurvatureProfile,
    counts: Sequence[int] = COUNTS,
) -> dict[int, CurvatureProfile]:
    """The profile for each number k of eigenpairs: energies in S, and the mean curvature outside it (CET §3.3).

    The eigenpairs are computed once, for all k, so that this costs what the spectrum of the profile cost. For
    ``distill`` that gives every eigenpair; for ``task`` no more than the profile has. What ``cet`` takes of a profile
    is renewed; the expected energies that other methods take stay those of the profile's own number.

    Args:
        model: The float network, in eval mode, its layers' weights requiring gradients.
        layers: The layers.
        objective: The objective whose Hessian is meant, on the samples that the profile was measured on.
        deltas: Layer name to bits to the error Δ_i(b) of nearest rounding.
        profile: What was measured, ``subspace`` included.
        counts: The numbers of eigenpairs; those of which there are not so many are left out, and that of the profile
            is added.

    Returns:
        k to the profile, from the fewest eigenpairs to the most; empty where the profile holds no eigenvalues.
    """
    known, trace = len(profile.eigenvalues), profile.trace
    if not known or trace is None:
        return {}
    values, energies = (_gram if objective.name == "distill" else _lanczos)(model, layers, objective, deltas, profile)
    n = sum(layer.weights for layer in layers)
    profiles = {}
    for k in sorted({*(k for k in counts if k <= len(values)), known}):
        rows = tuple(
            replace(row, subspace_energy={b: float(e[:k].sum()) for b, e in energies[row.name].items()})
            for row in profile.layers
        )
        profiles[k] = replace(
            profile,
            layers=rows,
            eigenvalues=tuple(values[:k].tolist()),
            residual_curvature=residual_curvature(trace, values[:k], n),
            eigenvalue_residuals=(),
        )
    return profiles


_Energies = dict[str, dict[int, Tensor]]  # layer name to bits to |λ_j| (v_jᵀ Δ_i(b))² of every eigenpair j


def _gram(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    deltas: Mapping[str, Mapping[int, Tensor]],
    profile: CurvatureProfile,
) -> tuple[Tensor, _Energies]:
    spectrum = gram_spectrum(model, layers, objective.batches, deltas, k=len(profile.eigenvalues), seed=profile.seed)
    energies = {name: {b: p.square() for b, p in by_bits.items()} for name, by_bits in spectrum.projected.items()}
    return spectrum.values, energies


def _lanczos(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    deltas: Mapping[str, Mapping[int, Tensor]],
    profile: CurvatureProfile,
) -> tuple[Tensor, _Energies]:
    with folded_hessian(model, layers, objective) as hessian:
        pairs = leading_pairs(hessian, len(profile.eigenvalues), profile.seed)
    energies = {}
    for layer, part in zip(layers, pairs.vectors.split(hessian.sizes), strict=True):
        along = {b: (part.T @ d.flatten().to(part)).double().square().cpu() for b, d in deltas[layer.name].items()}
        energies[layer.name] = {b: pairs.values.abs().cpu() * a for b, a in along.items()}
    return pairs.values, energies
