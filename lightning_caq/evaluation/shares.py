"""Shares: how much of the damage each layer does, and how much of it lies in the short-axis subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs
from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.network.perturbed import perturbed
from lightning_caq.profile import CurvatureProfile
from lightning_caq.studies import Energy


@dataclass(frozen=True)
class ErrorShare:
    """One layer's part of Σ A_i e_i(b_i), which bounds the error Φ of the network's output.

    Attributes:
        name: The layer.
        bits: Its bit-width b_i, on average where its channels differ.
        predicted: A_i e_i(b_i), in the unit of the network's output; ``None`` where it was not measured.
        observed: Root mean square over samples of the output's change with only this layer rounded, the mean of its
            error corrected, same unit;
            ``None`` where it was not measured.
    """

    name: str
    bits: int | float
    predicted: float | None
    observed: float | None = None


def error_shares(
    profile: CurvatureProfile, bits: Mapping[str, int | float], observed: Mapping[str, float] | None = None
) -> tuple[ErrorShare, ...]:
    """Every layer's part of Σ A_i e_i, for nearest rounding; layers that the profile does not know are left out.

    Costs nothing: A_i e_i(b) is in the profile (measure ``amplification``).

    Args:
        profile: What was measured.
        bits: Layer name to bit-width, as ``plan.bits``.
        observed: Layer name to observed error, from ``observed_errors``.

    Returns:
        One share a layer, in the order of the profile.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> profile = CurvatureProfile((LayerCurvature("fc", 8, 2, 8, carried_error={3: 0.5}),))
        >>> error_shares(profile, {"fc": 3})
        (ErrorShare(name='fc', bits=3, predicted=0.5, observed=None),)
    """
    shares = []
    for row in profile.layers:
        if row.name in bits:
            b = bits[row.name]
            predicted = row.carried_error.get(b) if isinstance(b, int) else None  # an average was not measured
            shares.append(ErrorShare(row.name, b, predicted, (observed or {}).get(row.name)))
    return tuple(shares)


def observed_errors(
    model: nn.Module,
    layers: Sequence[Layer],
    reference: Reference,
    errors: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor],
) -> dict[str, float]:
    """Error of the network's output with one layer rounded at a time: rms over samples of ‖F(w + Δ_i) − F(w)‖.

    Costs one forward pass of all samples a layer; the weights are put back.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        reference: Its outputs on the samples, in eval mode.
        errors: Layer name to Δ_i; layers without one are left out.
        shifts: Layer name to what corrects the mean of its error, where something does.

    Returns:
        Layer name to error, in the unit of the network's output.

    Example:
        >>> import torch
        >>> from lightning_caq.network.float_outputs import make_reference
        >>> net = nn.Linear(2, 1, bias=False)
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> reference = make_reference(net, [torch.eye(2)])
        >>> observed_errors(net, [layer], reference, {"": torch.tensor([[3.0, 4.0]])}, {})  # √((3² + 4²) / 2)
        {'': 3.53553...}
    """
    observed = {}
    for layer in layers:
        if layer.name in errors:
            with perturbed(model, [layer], errors, shifts):
                observed[layer.name] = reference.distance(model)
    return observed


@dataclass(frozen=True)
class SubspaceShare:
    """What rounding leaves of one layer in the short-axis subspace, nearest against the rounding that was chosen.

    Attributes:
        name: The layer.
        bits: Its bit-width, on average where its channels differ.
        nearest: With nearest rounding; ``None`` where it was not measured.
        chosen: With the plan's rounding; ``None`` where it was not measured.
    """

    name: str
    bits: int | float
    nearest: Energy | None
    chosen: Energy | None = None


def subspace_shares(
    profile: CurvatureProfile, bits: Mapping[str, int | float], chosen: Mapping[str, Energy] | None = None
) -> tuple[SubspaceShare, ...]:
    """Every layer's energies; layers that the profile does not know are left out.

    Costs nothing: the energies of nearest rounding are in the profile (measure ``subspace``).

    Args:
        profile: What was measured.
        bits: Layer name to bit-width, as ``plan.bits``.
        chosen: Layer name to energy of the plan's rounding, from ``rounding_energies``.

    Returns:
        One share a layer, in the order of the profile.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 8, 2, 8, subspace_energy={3: 0.5}, second_order={3: 0.75})
        >>> subspace_shares(CurvatureProfile((row,)), {"fc": 3})[0].nearest
        Energy(short=0.25, rest=0.125)
    """
    return tuple(
        SubspaceShare(
            row.name,
            bits[row.name],
            _energy(row.subspace_energy, row.second_order, bits[row.name]),
            (chosen or {}).get(row.name),
        )
        for row in profile.layers
        if row.name in bits
    )


def rounding_energies(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    errors: Mapping[str, Tensor],
    profile: CurvatureProfile,
) -> dict[str, Energy]:
    """Energies of the rounding errors that a plan really makes, one layer at a time.

    The subspace S is found again, by the route that the profile took, so that this costs what the spectrum cost.

    Args:
        model: The float network, in eval mode, its layers' weights requiring gradients.
        layers: The layers.
        objective: The objective whose Hessian is meant, on the samples that the profile was measured on.
        errors: Layer name to Δ_i, the plan's weights less the float ones.
        profile: Tells how many eigenpairs span S, the seed, and the curvature outside S.

    Returns:
        Layer name to energy; empty where the profile holds no eigenvalues.
    """
    k = len(profile.eigenvalues)
    if k == 0:
        return {}
    if objective.name == "distill":
        any_bits = 0  # projections are filed by bit-width; here there is one
        deltas = {layer.name: {any_bits: errors[layer.name]} for layer in layers}
        projected = gram_spectrum(model, layers, objective.batches, deltas, k=k, seed=profile.seed).projected
        squares = {name: by_bits[any_bits].square() for name, by_bits in projected.items()}
        return {name: Energy(0.5 * float(x[:k].sum()), 0.5 * float(x[k:].sum())) for name, x in squares.items()}
    with folded_hessian(model, layers, objective) as hessian:
        pairs = leading_pairs(hessian, k, profile.seed)
    outside, energies = profile.residual_curvature or 0.0, {}
    for layer, part in zip(layers, pairs.vectors.split(hessian.sizes), strict=True):
        delta = errors[layer.name].flatten().to(part)
        along = (part.T @ delta).double().square().cpu()
        short = float(pairs.values.abs() @ along)
        rest = outside * (float(delta.double().square().sum()) - float(along.sum()))
        energies[layer.name] = Energy(0.5 * short, 0.5 * (float(pairs.values @ along) - short + rest))
    return energies


def _energy(short: Mapping[int, float], whole: Mapping[int, float], bits: int | float) -> Energy | None:
    if not isinstance(bits, int) or bits not in short or bits not in whole:
        return None
    return Energy(0.5 * short[bits], 0.5 * (whole[bits] - short[bits]))
