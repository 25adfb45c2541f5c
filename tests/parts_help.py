"""What tests of parts share: a network before, while and after its weights are layers computes the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_caq.network.parts.expand import expanded, split_weights


def assert_close(a: Any, b: Any) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert (x is None) == (y is None)
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, equal_nan=True)


def assert_same_by_parts(net: nn.Module, *args: Any, **kwargs: Any) -> None:
    """torch's own outputs are the truth: by parts that are called, by weights alone, and in a copy."""
    net.eval()
    expected, kind = net(*args, **kwargs), type(net)
    with expanded(net):
        assert_close(net(*args, **kwargs), expected)
        calls: list[nn.Module] = []
        handles = [m.register_forward_hook(lambda m, a, y: calls.append(m)) for m in net.children()]
        assert_close(net(*args, **kwargs), expected)
        assert set(calls) == set(net.children()), "a part was not called"
        for handle in handles:
            handle.remove()
        with split_weights(net):
            assert_close(net(*args, **kwargs), expected)
        assert_close(copy.deepcopy(net)(*args, **kwargs), expected)
    assert type(net) is kind
    assert_close(net(*args, **kwargs), expected)
