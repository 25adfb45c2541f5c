"""Plain GPTQ with groups (Frantar et al. 2023), written out as in the paper, for comparison.

Columns go from left to right; the scale and the zero point of a group span its weights when the group is reached, as
the errors of the columns before left them. Layers are rounded in order of execution, each for the inputs that come out
of the rounded layers before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALE_BITS = 16
TABLE_BITS = 8  # of embeddings, which the paper leaves as they are
_DAMPING = 0.01


def gptq_weight(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """A rounded weight.

    Args:
        weight: Shape (outputs, inputs).
        hessian: E[x xᵀ] of the inputs, float64; the identity rounds to nearest.
        bits: Bits of a weight.
        group_size: Weights of a row that share a scale and a zero point.
    """
    w, h = weight.double().clone(), hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += _DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    top, rounded = 2**bits - 1, torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % group_size == 0:
            group = w[:, j : j + group_size]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scale = ((high - low) / top).clamp_min(1e-7).half().double()
            zero = (-low / scale).round()
        rounded[:, j] = scale * ((w[:, j] / scale + zero).round().clamp(0, top) - zero)
        error = (w[:, j] - rounded[:, j]) / factor[j, j]
        w[:, j:] -= error[:, None] * factor[j, j:]
    return rounded.to(weight.dtype)


def gptq(model: nn.Module, batches: Sequence[Tensor], bits: int, group_size: int) -> None:
    """Round every linear layer of a network in place, and embeddings, tied ones too, to the nearest of 8 bits.

    Args:
        model: The network; its linear layers are registered in the order of their execution.
        batches: Inputs to calibrate with.
        bits: Bits of a weight.
        group_size: Weights of a row that share a scale and a zero point.
    """
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for table in tables.values():
            eye = torch.eye(table.shape[1], dtype=torch.float64, device=table.device)
            table.copy_(gptq_weight(table, eye, TABLE_BITS, group_size))
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in tables:
                module.weight.copy_(gptq_weight(module.weight, _hessian(model, module, batches), bits, group_size))


def stored_bits(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bits of a weight: codes, a 16-bit scale and a zero point of as many bits as a code for every group."""
    return rows * (columns * bits + -(-columns // group_size) * (SCALE_BITS + bits))


def _hessian(model: nn.Module, module: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """E[x xᵀ] of what reaches a linear layer."""
    sums: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        sums.append(x.T @ x / len(x))

    handle = module.register_forward_pre_hook(look)
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.stack(sums).mean(0)
