"""Sealed files: whatever is changed in them is told."""

import hashlib
import json

import pytest
import torch
from every import every
from safetensors.torch import load_file, save_file

from lightning_caq.errors import PlanError
from lightning_caq.export import sealed
from lightning_caq.export.sealed import read_sealed, write_sealed


@pytest.fixture
def path(tmp_path):
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.tensor(7)}
    return write_sealed(tmp_path / "new" / "file", {"words": ["ä", 0]}, tensors)


def test_read_back(path):
    description, tensors = read_sealed(path)
    assert description == {"words": ["ä", 0]}
    assert torch.equal(tensors["b"], load_file(path)["float32"].reshape(2, 3))  # any reader of safetensors reads it
    assert tensors["c"] == 7


def test_the_same_contents_give_the_same_bytes(tmp_path):
    tensors = {name: torch.ones(3) for name in "zyxab"}
    first = write_sealed(tmp_path / "1", {"x": 1}, tensors).read_bytes()
    assert write_sealed(tmp_path / "2", {"x": 1}, tensors).read_bytes() == first


def test_tensors_that_share_memory(tmp_path):
    x = torch.arange(6.0)
    _, tensors = read_sealed(write_sealed(tmp_path / "f", {}, {"x": x, "part": x[2:4], "t": x.view(2, 3).T}))
    assert torch.equal(tensors["part"], x[2:4])
    assert torch.equal(tensors["t"], x.view(2, 3).T)


@every("flip", [1, 32, 128])
def test_any_changed_byte_is_refused(path, flip):
    payload = path.read_bytes()
    for place in range(len(payload)):
        path.write_bytes(payload[:place] + bytes([payload[place] ^ flip]) + payload[place + 1 :])
        with pytest.raises(PlanError):
            read_sealed(path)


def test_any_truncation_and_any_addition_is_refused(path):
    payload = path.read_bytes()
    for length in range(len(payload)):
        path.write_bytes(payload[:length])
        with pytest.raises(PlanError, match="truncated"):
            read_sealed(path)
    path.write_bytes(payload + b"\0")
    with pytest.raises(PlanError, match="damaged"):
        read_sealed(path)


def test_other_files(tmp_path):
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_sealed(tmp_path / "none")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(PlanError, match="no file of save_quantized"):
        read_sealed(tmp_path / "plain")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(PlanError, match="truncated or no safetensors file"):
        read_sealed(tmp_path / "pickle")


def test_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "VERSION", 3)
    path = write_sealed(tmp_path / "f", {}, {})
    assert read_sealed(path) == ({}, {})
    monkeypatch.setattr(sealed, "VERSION", 2)
    with pytest.raises(PlanError, match="has format 3; this version of lightning-caq reads up to 2"):
        read_sealed(path)


@every("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_tensors_of_every_type_and_shape_come_back(tmp_path, dtype):
    shapes = {"scalar": (), "none": (0, 3), "matrix": (2, 3), "one": (1,)}
    tensors = {name: (3 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    _, found = read_sealed(write_sealed(tmp_path / "f", {}, tensors | {"byte": torch.tensor(7, dtype=torch.uint8)}))
    assert all(torch.equal(found[name], x) and found[name].dtype == dtype for name, x in tensors.items())
    assert found["byte"] == 7


def test_a_name_takes_a_few_bytes(tmp_path):
    """A header of safetensors takes about a hundred bytes a tensor."""
    few, many = ({f"layers.{i}.norm.running_mean": torch.ones(1) for i in range(n)} for n in (10, 110))
    sizes = [write_sealed(tmp_path / "f", {}, tensors).stat().st_size for tensors in (few, many)]
    assert sizes[1] - sizes[0] < 100 * (4 + 10)


def test_the_fingerprint_is_that_of_the_file_with_zeros_in_its_place(path):
    payload = path.read_bytes()
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    found = json.loads(header["__metadata__"]["lightning_caq"])["fingerprint"]
    assert hashlib.sha256(payload.replace(found.encode(), b"0" * 64)).hexdigest() == found
