"""The contexts in which curvature is measured."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.utilities.contexts import InFloat32, curvature_safe, full_float32
from lightning_caq.utilities.isolation import seeded


def random_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_curvature_safe_allows_attention_and_leaves_autocast():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), curvature_safe(nn.Linear(1, 1)):
        out = F.scaled_dot_product_attention(q, q, q)
        assert out.dtype == torch.float32
        assert (q @ q.transpose(-1, -2)).dtype == torch.float32
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), q)[0].norm() > 0


def _shortened():
    """Whether matrix products and convolutions may shorten float32, by whichever switches this version of torch has."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        parts = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        return [part.fp32_precision in ("tf32", "bf16") for part in parts]
    return [torch.get_float32_matmul_precision() != "highest", backends.cudnn.allow_tf32]


@every("allowed", ["highest", "medium"])
def test_float32_is_not_shortened(allowed):
    torch.set_float32_matmul_precision(allowed)
    try:
        before = _shortened()
        assert any(before)  # of convolutions it is, unless told otherwise
        with curvature_safe(nn.Linear(1, 1)):
            assert not any(_shortened())
        assert _shortened() == before
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this version of torch has one kind of switch")
def test_float32_is_not_shortened_where_the_new_switches_were_used():
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        with full_float32():
            assert not any(_shortened())
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_and_back_returns_the_very_values():
    module = nn.Linear(3, 3).bfloat16()
    before, parameter = module.weight.detach().clone(), module.weight
    with InFloat32(module) as float32:
        assert module.weight.dtype == torch.float32
        assert float32.batch(torch.ones(2, 3).bfloat16()).dtype == torch.float32
        assert float32.outside(lambda m: {"same": float(torch.equal(m.weight, before))})(module) == {"same": 1.0}
        with torch.no_grad():
            module.bias.zero_()
    assert module.weight is parameter
    assert torch.equal(module.weight, before)
    assert (module.bias.dtype, float(module.bias.detach().abs().sum())) == (torch.bfloat16, 0.0)


def test_double_precision_stays():
    module = nn.Linear(3, 3).double()
    with InFloat32(module) as float32:
        assert module.weight.dtype == torch.float64
        assert float32.batch(torch.ones(2, 3).double()).dtype == torch.float64


def test_seeded_restores_the_random_states_after_an_error():
    before = random_state()

    def disturb():
        with seeded():
            torch.rand(1), np.random.rand(1), random.random()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        disturb()
    assert random_state() == before
