"""Tightness: what composition predicts of the output error, beside the output error itself (CAQ 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_caq.allocation.composition import compose, correlated_bound
from lightning_caq.errors import OptionError
from lightning_caq.measures.rounding.bias_correction import bias_corrections
from lightning_caq.measures.rounding.carried import carried_errors
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, profile_quantizer
from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.layers import Layer
from lightning_caq.network.perturbed import perturbed
from lightning_caq.profile import CurvatureProfile
from lightning_caq.sizes import Width
from lightning_caq.studies import Tightness
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved


def tightness(
    model: nn.Module,
    layers: Sequence[Layer],
    reference: Reference,
    profile: CurvatureProfile,
    bits: Mapping[str, Width],
) -> Tightness:
    """Compare the predicted with the observed error of a network whose weights are rounded to nearest.

    Biases are corrected for the mean of each layer's error, as re-centring does: a shift that is the same for every
    sample is not what is to be predicted. Costs three forward passes over the batches and a backward pass for each
    output of a sample, at most 16, each worth about two forward passes: some 23 for ten classes, 35 at most, however
    many layers there are. A few dozen samples are enough to judge by.

    Args:
        model: The float network; left as it was.
        layers: The layers that are rounded.
        reference: Its outputs on the samples, in eval mode.
        profile: Tells which values weights are rounded to; where it holds ``lipschitz_amplification`` of every layer,
            that bound is given too.
        bits: Layer name to bit-width, or to one a channel, for every layer.

    Returns:
        The errors.

    Raises:
        OptionError: If a layer has no bits.

    Example:
        >>> import torch
        >>> from lightning_caq.network.float_outputs import make_reference
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.measures.measure import measure
        >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
        >>> reference, profile = make_reference(net, [x]), measure(net, [x])
        >>> errors = tightness(net, find_layers(net, x), reference, profile, {"0": 8, "2": 8})
        >>> errors.bound >= errors.correlated >= errors.rss, 0.9 < errors.ratios["linear"] < 1.1
        (True, True)
    """
    missing = [layer.name for layer in layers if layer.name not in bits]
    if missing:
        raise OptionError(f"bits has no entry for the layers {missing}; give every layer its bits.")
    chosen = {layer.name: bits[layer.name] for layer in layers}
    with curvature_safe(model), preserved(model):
        quantizer = profile_quantizer(profile)
        deltas = {x.name: nearest_errors(model, x, [chosen[x.name]], quantizer) for x in layers}
        shifts = bias_corrections(model, layers, reference.batches, deltas)
        carried = carried_errors(model, layers, reference.batches, deltas, shifts, seed=profile.seed)
        with perturbed(
            model,
            layers,
            {name: errors[chosen[name]] for name, errors in deltas.items()},
            {name: errors[chosen[name]] for name, errors in shifts.items()},
        ):
            observed = reference.distance(model)
    gram = carried.gram(chosen)
    gains = [profile[name].lipschitz_amplification for name in chosen]
    errors = [carried.errors[name][b] for name, b in chosen.items()]
    return Tightness(
        observed=observed,
        bound=carried.bound(chosen),
        correlated=correlated_bound(gram.numpy()),
        rss=float(gram.trace()) ** 0.5,
        linear=float(gram.sum().clamp_min(0)) ** 0.5,
        lipschitz=None if None in gains else compose([g for g in gains if g is not None], errors).bound,
    )
