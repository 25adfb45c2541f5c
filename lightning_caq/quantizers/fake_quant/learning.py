"""Learning scales: while a quantized network is trained on, the steps of its grids are trained with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_caq.errors import LayerError
from lightning_caq.network.parts.part import weight_identity
from lightning_caq.quantizers.fake_quant.state import LEARNED, PREFIX, rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.affine import Grid


@contextmanager
def learning_scales(model: nn.Module) -> Iterator[None]:
    """While open, the scales of weights and the clips of inputs are Parameters that training changes.

    Scales of weights are learned as in LSQ (Esser et al. 2020), the clips of inputs that are never negative as in PACT
    (Choi et al. 2018); inputs with both signs keep their grids, and so do the tables of codebooks. Open it before the
    optimizer is made, in Lightning around ``trainer.fit``. The callback settles the network when that ends; without it
    call ``plan.settled(model)`` inside. Afterwards the network is an ordinary quantized one with the new scales.

    State-dict keys stay as they are: what is learned is in none of the checkpoints that are written meanwhile. Such a
    checkpoint holds the values that the network computes with, and runs in a plain network; it does not fit the older
    plan that lies beside them.

    Args:
        model: A quantized network.

    Raises:
        LayerError: If the network is not quantized, or no layer of it has an affine grid.

    Example:
        >>> from lightning_caq import quantize
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 4)
        >>> plan = quantize(net, [x], avg_bits=2, bits=(2,)).plan
        >>> keys = list(net.state_dict())
        >>> with learning_scales(net):
        ...     optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        ...     net(x).square().mean().backward()
        ...     optimizer.step()
        ...     plan = plan.settled(net)
        >>> list(net.state_dict()) == keys, plan.avg_bits
        (True, 2.0)
    """
    modules = [m for m in quantized_modules(model).values() if isinstance(rounding_state(m).calibrated, Grid)]
    if not modules:
        raise LayerError(
            f"{type(model).__name__} has no layer with an affine grid; run quantize() on it, with quantizer='affine', "
            "before its scales are learned."
        )
    first = {weight_identity(module): rounding_state(module) for module in reversed(modules)}
    for module in modules:
        owner, state, device = first[weight_identity(module)], rounding_state(module), module.weight.device
        if owner.scale_factor is None:  # tied modules learn together
            assert isinstance(owner.calibrated, Grid)
            ones = torch.ones_like(owner.calibrated.scale, dtype=torch.float32, device=device)
            owner.scale_factor = nn.Parameter(ones)
            if owner.input_grid is not None and owner.input_grid.zero_point == 0:
                owner.clip_factor = nn.Parameter(torch.ones((), device=device))
        state.scale_factor, state.clip_factor = owner.scale_factor, owner.clip_factor
        for name in LEARNED:
            module.register_parameter(PREFIX + name, getattr(owner, name))
    try:
        yield
    finally:
        for module in modules:
            state = rounding_state(module)
            state.calibrated, state.input_grid = state.grid, state.learned_input_grid
            state.scale_factor = state.clip_factor = None
            for name in LEARNED:
                delattr(module, PREFIX + name)
