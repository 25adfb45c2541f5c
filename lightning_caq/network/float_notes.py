"""Notes on what is left in floating point, and on what is not deployed, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_caq.network.deployed import Deployed, Part
from lightning_caq.network.layers import Layer, layer_module
from lightning_caq.network.parts.baked import is_baked
from lightning_caq.notes import Note

_LISTED = 5
_NOTEWORTHY = 0.01  # of the weights; in a network ten times smaller that is a tenth of its size


def float_notes(deployed: Deployed) -> tuple[Note, ...]:
    """What the user should know of the weights that are not quantized.

    Example:
        >>> from lightning_caq.network.layers import Layer
        >>> left = (Part("encoder.in_proj_weight", 30, "MultiheadAttention"), Part("tokens", 20))
        >>> deployed = Deployed((Layer("head", "linear", (5, 10)),), left, (), ())
        >>> for note in float_notes(deployed):
        ...     print(note.severity, note)
        warning 50 % of the weights stay in float32: encoder.in_proj_weight (30 %, MultiheadAttention), tokens (20 %).
    """
    notes = []
    if deployed.left:
        share = sum(part.weights for part in deployed.left) / deployed.weights
        text = f"{percent(share)} of the weights stay in float32: {_listed(deployed.left, deployed.weights)}."
        notes.append(Note(text, "warning" if share >= _NOTEWORTHY else "information"))
    if deployed.excluded:
        share = sum(part.weights for part in deployed.excluded) / deployed.weights
        listed = _listed(deployed.excluded, deployed.weights)
        notes.append(Note(f"{percent(share)} of the weights stay in float32, as include and exclude ask: {listed}."))
    if deployed.outside:
        weights = sum(part.weights for part in deployed.outside)
        names = _together(deployed.outside)
        notes.append(
            Note(
                f"{weights:,} weights are not counted as part of the deployed network, as no calibration batch reaches "
                f"them or deployed leaves them out: {', '.join(names)}. Name what is deployed with deployed=[...]."
            )
        )
    return tuple(notes)


def baked_notes(model: nn.Module, layers: Sequence[Layer]) -> tuple[Note, ...]:
    """What the user should know of weights that parametrizations compute; none as a rule.

    Example:
        >>> baked_notes(nn.Linear(1, 1), [Layer("", "linear", (1, 1))])
        ()
    """
    baked = [f"'{layer.name}'" for layer in layers if is_baked(layer_module(model, layer))]
    if not baked:
        return ()
    more = f" and {len(baked) - _LISTED} more" if len(baked) > _LISTED else ""
    return (
        Note(
            f"The weights of {', '.join(baked[:_LISTED])}{more} are computed of other parameters (a norm, a mask or "
            "another parametrization): what they come to is quantized and takes the place of these in the state dict."
        ),
    )


def percent(share: float) -> str:
    """A share in per cent, two digits of it where it is small.

    Example:
        >>> percent(0.314), percent(0.0042)
        ('31 %', '0.42 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def _listed(parts: Sequence[Part], total: int) -> str:
    listed = [f"{x.name} ({percent(x.weights / total)}{', ' + x.kind if x.kind else ''})" for x in parts[:_LISTED]]
    return ", ".join(listed) + (f", and {len(parts) - _LISTED} more" if len(parts) > _LISTED else "")


def _together(parts: Sequence[Part]) -> list[str]:
    """The outermost modules of parts, each once."""
    names = list(dict.fromkeys(part.name.split(".")[0] for part in parts))
    return names[:_LISTED] + ([f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else [])
