"""Tensors in containers of all kinds: found by path, replaced without a change to what was given."""

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from every import every
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_caq.utilities.structures import describe, is_object, map_tensors, named_tensors, tensors

X, Y = torch.arange(4.0), torch.arange(3)


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "text"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class ReadOnly(Mapping):
    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


CONTAINERS = [{"x": X, "y": Y}, UserDict(x=X, y=Y), Record(X, Y), ReadOnly(x=X, y=Y), Pair(X, Y), [X, Y], (X, Y)]


@every("container", CONTAINERS)
def test_tensors_are_found_in_order(container):
    assert [id(t) for t in tensors(container)] == [id(X), id(Y)]


@every("container", CONTAINERS)
def test_replacing_keeps_the_class_and_the_original(container):
    changed = map_tensors(lambda path, t: t + 1, container)
    assert [t.tolist() for t in tensors(changed)] == [(X + 1).tolist(), (Y + 1).tolist()]
    assert [id(t) for t in tensors(container)] == [id(X), id(Y)]
    assert type(changed) is (dict if isinstance(container, ReadOnly) else type(container))


def test_paths_lead_through_nested_containers():
    nested = {"a": [X, {"b": Pair(X, Y)}], "c": 3}
    assert [path for path, _ in named_tensors(nested)] == [("a", 0), ("a", 1, "b", 0), ("a", 1, "b", 1)]
    assert map_tensors(lambda path, t: path, nested)["a"][1]["b"].y == ("a", 1, "b", 1)


def test_a_packed_sequence_holds_its_data_alone():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    changed = map_tensors(lambda path, t: 2 * t, packed)
    assert isinstance(changed, PackedSequence)
    assert changed.data.tolist() == [2.0] * 5
    assert torch.equal(changed.batch_sizes, packed.batch_sizes)


def test_objects_are_told_from_containers_and_functions():
    assert is_object(SimpleNamespace(x=X))
    assert not any(map(is_object, [X, {"x": X}, [X], Record(X, Y), "text", 3, None, torch.relu]))


def test_descriptions_name_shapes_and_types():
    assert describe({"x": X, "y": (Y, 3)}) == "dict(x: float32[4], y: tuple(int64[3], int))"
    assert describe(UserDict(x=X)) == "UserDict(x: float32[4])"
    assert describe(Record(X, Y)) == "Record(x: float32[4], y: int64[3], name: str)"
