"""Attention of torch: projections of queries, keys and values are layers, and so is that of the output.

``nn.MultiheadAttention`` hands all four weights to one function. Here the same is computed with a layer for each, for
samples first whatever the order of the axes is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.parts.kind import Kind, arguments
from lightning_caq.network.parts.part import View

NAMES = ("q_proj", "k_proj", "v_proj")


def _views(module: nn.MultiheadAttention) -> dict[str, View]:
    if module.in_proj_weight is None:
        return {name: View(f"{name}_weight") for name in NAMES}
    size = module.embed_dim
    return {name: View("in_proj_weight", rows=(i * size, (i + 1) * size)) for i, name in enumerate(NAMES)}


def _route(module: nn.MultiheadAttention, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is not F.multi_head_attention_forward:
        return NotImplemented
    return _attention(module, **arguments(func, args, kwargs))


def _attention(
    module: Any,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    **of_weights: Any,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, whose arguments these are; those of weights are left to the parts."""
    batched = query.ndim == 3
    query, key, value = (x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (query, key, value))
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    layers = [getattr(module, name) for name in NAMES]
    q, k, v = (
        layer(x) if bias is None else layer(x) + bias
        for layer, x, bias in zip(layers, (query, key, value), biases, strict=True)
    )
    k, v = _extended(k, bias_k, zero=add_zero_attn), _extended(v, bias_v, zero=add_zero_attn)
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, k)
    p, weights = dropout_p if training else 0.0, None
    if need_weights:
        scores = q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(3), p)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    output = module.out_proj(heads.transpose(1, 2).flatten(2))
    if batched:
        return output.transpose(0, 1), weights
    return output.squeeze(0), None if weights is None else weights.squeeze(0)


def _extended(states: Tensor, bias: Tensor | None, *, zero: bool) -> Tensor:
    """Keys or values with the positions behind them that every sample has."""
    if bias is not None:
        states = torch.cat([states, bias.expand(len(states), -1, -1)], 1)
    return F.pad(states, (0, 0, 0, 1)) if zero else states


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores; it broadcasts to (samples, heads, queries, keys)."""
    if mask is not None:
        mask = _added(mask, q, k)
        mask = mask.unflatten(0, q.shape[:2]) if mask.ndim == 3 else mask
    if padding is None:
        return mask
    padding = _added(padding, q, k)[:, None, None]
    return padding if mask is None else mask + padding


def _added(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as numbers to be added, with zeros for keys that every sample has."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
    return F.pad(mask, (0, k.shape[2] - mask.shape[-1]))


ATTENTION = Kind(
    name="attention",
    covers=lambda module: isinstance(module, nn.MultiheadAttention),
    views=_views,
    route=_route,
)
