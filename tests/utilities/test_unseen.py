"""Gradients through what cuts them off, in one thread and for a while."""

import threading

import torch
from every import every
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_caq.utilities.unseen import checkpointing_off, gradients_as_usual, gradients_through

X = torch.ones(2, requires_grad=True)


@torch.no_grad()
def _decorated(x):
    return 2 * x


def _in_no_grad(x):
    with torch.no_grad():
        return 2 * x


def _in_inference_mode(x):
    with torch.inference_mode():
        return 2 * x


def _set_off(x):
    torch.set_grad_enabled(False)
    y = 2 * x
    torch.set_grad_enabled(True)
    return y


def _set_off_in_a_block(x):
    with torch.set_grad_enabled(False):
        return 2 * x


CUTS = [
    _decorated,
    _in_no_grad,
    _in_inference_mode,
    _set_off,
    _set_off_in_a_block,
    lambda x: 2 * x.detach(),
    lambda x: 2 * x.data,
]


@every("cut", CUTS)
def test_gradients_pass_while_it_is_open_and_not_afterwards(cut):
    with gradients_through():
        (gradient,) = torch.autograd.grad(cut(X).sum(), X)
    assert gradient.tolist() == [2, 2]
    assert not cut(X).requires_grad
    assert torch.is_grad_enabled()


def test_another_thread_is_not_touched():
    seen = []
    with gradients_through():
        thread = threading.Thread(target=lambda: seen.append(_in_no_grad(X).requires_grad))
        thread.start()
        thread.join()
    assert seen == [False]


def test_nested_uses_end_in_their_order():
    with gradients_through():
        with gradients_through():
            pass
        assert _in_no_grad(X).requires_grad
    assert not _in_no_grad(X).requires_grad


@every("reentrant", [True, False])
def test_checkpointed_parts_run_once(reentrant):
    calls = []

    class Part(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x.square()

    for off in (True, False):
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        if off:
            with checkpointing_off():
                y = checkpoint(Part(), x, use_reentrant=reentrant).sum()
                (gradient,) = torch.autograd.grad(y, x, create_graph=True)  # refused inside a reentrant checkpoint
                (second,) = torch.autograd.grad(gradient.sum(), x)
            assert second.tolist() == [2, 2]
        else:
            checkpoint(Part(), x, use_reentrant=reentrant).sum().backward()
        assert len(calls) == (1 if off else 2)


def test_hooks_of_others_cut_gradients_off_as_ever():
    seen = []
    with gradients_through():
        with gradients_as_usual(), torch.no_grad():
            seen += [(2 * X).requires_grad, X.detach().requires_grad]
        with torch.no_grad():
            seen += [(2 * X).requires_grad, X.detach().requires_grad]
    assert seen == [False, False, True, True]
