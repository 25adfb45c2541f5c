import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_caq.network.parts.expand import expanded


def test_copies_and_pickles_of_an_expanded_network_are_networks_of_their_own():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False)
    x = torch.randn(2, 3, 4)
    with expanded(net.eval()):
        file = io.BytesIO()
        torch.save(net, file)
        for other in (copy.deepcopy(net), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
            torch.testing.assert_close(other(x), net(x))
            with torch.no_grad():
                other.layers[0].self_attn.in_proj_weight.zero_()
            assert other.layers[0].self_attn.q_proj.weight.eq(0).all()
            assert not net.layers[0].self_attn.q_proj.weight.eq(0).any()


def noting(calls: list[str], forward: Any) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append("linear1")
        return forward(x)

    return run


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_fused_layers_call_their_children():
    """In eval mode without gradients torch would read their weights in one operator."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False, False, False]])
    calls: list[str] = []
    with torch.no_grad():
        fused = net(x, src_key_padding_mask=padding)
        with expanded(net):
            for layer in net.layers:
                layer.linear1.forward = lambda h, forward=layer.linear1.forward: (calls.append("linear1"), forward(h))[
                    1
                ]
            plain = net(x, src_key_padding_mask=padding)
    assert calls == ["linear1"] * 2
    torch.testing.assert_close(fused[~padding], plain[~padding])
