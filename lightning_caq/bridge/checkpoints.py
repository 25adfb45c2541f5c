"""Checkpoints: what a quantization leaves in a checkpoint, and how a network gets it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_caq.bridge.outputs import Outcome
from lightning_caq.errors import PlanError
from lightning_caq.network.parts.part import WeightPart
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, weight_key
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import swap
from lightning_caq.report import QuantizationReport

VERSION = 1
LATENT = "caq_latent_weights"


def state_of(outcome: Outcome) -> dict[str, Any]:
    """What the callback keeps in a checkpoint: plain containers and tensors, which ``weights_only`` loading accepts."""
    plan, profile, report = outcome
    return {"version": VERSION, "plan": plan.state_dict(), "profile": profile.to_json(), "report": report.to_json()}


def put_on_grid(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Replace the weights in a checkpoint by the values on the grid that the network computes with.

    While a swapped network trains on, its parameters are off the grid. The checkpoint then holds the network that was
    validated, and the parameters themselves under a key of their own.

    Args:
        model: The network that is saved.
        checkpoint: The checkpoint; changed in place.
    """
    weights, latent = checkpoint["state_dict"], {}
    for name, module in model.named_modules(remove_duplicate=False):
        key = weight_key(module, f"{name}.".removeprefix("."))
        if isinstance(module, FakeQuant) and rounding_state(module).quantizing and key in weights:
            if key not in latent:
                latent[key] = weights[key]  # not always the module's own: an averaging callback saves the average
                weights[key] = latent[key].detach().clone()
            weight = module.view.of(weights[key]) if isinstance(module, WeightPart) else weights[key]
            weight.copy_(rounding_state(module).grid.to(weight.device).nearest(weight))
    if any(not torch.equal(weight, weights[key]) for key, weight in latent.items()):
        checkpoint[LATENT] = latent


def restore(
    model: nn.Module,
    checkpoint: dict[str, Any],
    kind: str,
    *,
    resuming: bool,
    averages: Sequence[nn.Module] = (),
) -> Outcome | None:
    """Swap a network that was just filled from a checkpoint by the plan that came with it.

    Args:
        model: The network.
        checkpoint: The checkpoint.
        kind: The class name with which the callback's key in the checkpoint begins.
        resuming: Whether training goes on, from the parameters between the grid points if there are any.
        averages: What averaging callbacks keep beside the network. These callbacks have filled them with the weights
            of the checkpoint, and the network with weights between the grid points if the checkpoint has both.

    Returns:
        What is known of the quantization; ``None`` if the network is a float one.

    Raises:
        PlanError: If the checkpoint was written by a later version, or its plan belongs to another network.
    """
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(kind) and state]
    if not states:
        return None
    state = states[-1]
    if state["version"] != VERSION:
        raise PlanError(f"The checkpoint holds a quantization of version {state['version']}; version 1 is known.")
    plan = QuantizationPlan.from_state_dict(state["plan"])
    filled, *others = (*averages, model)
    if not plan.attach(filled):
        rank_zero_warn(
            "caq: the checkpoint holds a quantization plan, but its weights do not lie on the plan's grid; the "
            "network runs as the float network they are."
        )
        return None
    for network in others:
        swap(network, plan.grids(), plan.input_grids())
    if resuming:
        beside = averages and "current_model_state" in checkpoint
        for network in averages if beside else (*averages, model):
            _put(network, checkpoint.get(LATENT, {}))
    return Outcome(plan, CurvatureProfile.from_json(state["profile"]), QuantizationReport.from_json(state["report"]))


def put_in_force(plan: QuantizationPlan, model: nn.Module) -> bool:
    """Swap a network again by the plan that was in force on it, if ``configure_model`` ran once more and undid that.

    Returns:
        Whether the network is quantized; where the plan no longer fits, a warning says that it runs in float.
    """
    try:
        with torch.inference_mode(False):  # buffers made in inference mode could never be trained with again
            if not plan.attach(model):
                plan.apply(model)
    except PlanError as error:
        rank_zero_warn(
            f"caq: the network that was quantized has lost its fake-quant layers ({error}) It runs as a float "
            "network. If configure_model rebuilds the layers, let it return early where they exist."
        )
        return False
    return True


def _put(network: nn.Module, values: dict[str, Tensor]) -> None:
    weights = dict(network.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)
