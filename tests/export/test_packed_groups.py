"""Packed weights of groups against codes that Python takes out of the bytes, and files that hold something else."""

import pytest
import torch
from torch import nn

from lightning_caq import load_quantized, quantize, save_quantized
from lightning_caq.errors import PlanError
from lightning_caq.export.packed_groups import PackedGroups
from lightning_caq.export.sealed import read_sealed, write_sealed
from lightning_caq.quantizers.grids.affine import fit_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_weight_is_that_of_its_grid(bits, dtype):
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(bits))
    grid = fit_grid(weight, bits, (7, 1), group_size=32, scale_dtype=dtype)
    packed = PackedGroups.of(weight, grid)
    assert torch.equal(packed.values(), grid.nearest(weight))
    assert packed.codes.numel() == -(-700 * bits // 8)
    assert packed.zero_points.numel() == -(-7 * 4 * (bits + 1) // 8)
    assert (packed.scale.dtype, tuple(packed.scale.shape)) == (dtype, (7, 1, 4))
    bytes_of = {part: getattr(packed, part) for part in packed.parts}
    assert all(torch.equal(getattr(packed.to(torch.device("cpu")), part), x) for part, x in bytes_of.items())


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


EDITS = {
    "another group size": lambda layer, tensors: layer.update(group_size=64),
    "scales of fewer groups": lambda layer, tensors: tensors.update({"0.weight.scale": torch.ones(6, 1, 1)}),
    "zero points too many": lambda layer, tensors: tensors.update(
        {"0.weight.zero_points": torch.zeros(99, dtype=torch.uint8)}
    ),
    "no zero points": lambda layer, tensors: tensors.pop("0.weight.zero_points"),
    "scales of whole numbers": lambda layer, tensors: tensors.update(
        {"0.weight.scale": tensors["0.weight.scale"].int()}
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_files_that_hold_something_else(edit, tmp_path):
    net = _net()
    quantize(
        net, [torch.randn(64, 40)], avg_bits=3, bits=(3,), method="uniform", compare=(), guard=False, group_size=32
    )
    path = save_quantized(net, tmp_path / "net.safetensors")
    load_quantized(_net(), path)
    description, tensors = read_sealed(path)
    edit(description["layers"][0], tensors)
    write_sealed(path, description, tensors)
    fresh = _net()
    before = fresh[0].weight.detach().clone()
    with pytest.raises(PlanError, match="is damaged"):
        load_quantized(fresh, path)
    assert type(fresh[0]) is nn.Linear
    assert torch.equal(fresh[0].weight, before)
