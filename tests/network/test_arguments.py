"""Which arguments of forward a batch fills: inputs all of them, labels none."""

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from every import every
from torch import nn

from lightning_caq.network.arguments import Arguments, possible_arguments

X, Z, Y = torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4).long()
MASK, SEQUENCES = torch.ones(4, 5), torch.zeros(4, 5, 2)


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    label: torch.Tensor


def _net(forward):
    net = nn.Module()
    net.forward = forward
    return net


def _taken(forward, batch):
    """Arguments of the first way, tensors named by where they are kept in this file."""
    names = {id(batch): "batch", id(X): "X", id(Z): "Z", id(Y): "Y", id(MASK): "M", id(SEQUENCES): "S"}
    args, kwargs = next(possible_arguments(_net(forward), batch)).of(batch)
    return [names.get(id(x), "?") for x in args], {k: names.get(id(x), "?") for k, x in kwargs.items()}


CASES = [
    (lambda x: 0, X, ["X"], {}),
    (lambda x: 0, (X, Y), ["X"], {}),
    (lambda x: 0, [X, Y], ["X"], {}),
    (lambda x, z: 0, (X, Z, Y), ["X", "Z"], {}),
    (lambda x, mask=None: 0, (X, MASK, Y), ["X", "M"], {}),
    (lambda x, mask=None: 0, (X, Y), ["X"], {}),  # a label is no mask
    (lambda x, mask=None: 0, (SEQUENCES, MASK), ["S", "M"], {}),  # no labels at all
    (lambda x, labels=None: 0, (X, Y, Z), ["X"], {}),
    (lambda x, y=None: 0, (X, Y, Y), ["X"], {}),
    (lambda x, flag=False: 0, (X, Y), ["X"], {}),
    (lambda x, other=None: 0, (X, Y, Y), ["X"], {}),  # two labels
    (lambda *inputs: 0, (X, Y), ["X"], {}),
    (lambda *inputs: 0, (X, Z, Y), ["X", "Z"], {}),
    (lambda x, z: 0, {"z": Z, "x": X, "labels": Y}, [], {"x": "X", "z": "Z"}),
    (lambda x: 0, UserDict(x=X, labels=Y), [], {"x": "X"}),
    (lambda **inputs: 0, {"x": X, "z": Z}, [], {"x": "X", "z": "Z"}),
    (lambda batch: 0, {"x": X}, ["batch"], {}),
    (lambda x: 0, Record(X, Y), [], {"x": "X"}),
    (lambda x: 0, Pair(X, Y), [], {"x": "X"}),
    (lambda inputs: 0, Pair(X, Y), ["X"], {}),
]


@every(("forward", "batch", "args", "kwargs"), CASES)
def test_the_likeliest_way(forward, batch, args, kwargs):
    assert _taken(forward, batch) == (args, kwargs)


def test_what_a_tuple_begins_with_is_unpacked_where_forward_takes_several():
    for batch, want in ((((X, Z), Y), (X, Z)), (({"x": X, "z": Z}, Y), (X, Z))):
        ways = [way.of(batch) for way in possible_arguments(_net(lambda x, z: 0), batch)]
        flat = [[*args, *kwargs.values()] for args, kwargs in ways]
        assert any(len(x) == 2 and x[0] is want[0] and x[1] is want[1] for x in flat)


def test_what_is_used_is_known_by_its_path():
    arguments = Arguments(places=((0,),), names=(("mask", (1, "m")),))
    assert arguments.uses((0, "x"))
    assert arguments.uses((1, "m"))
    assert not arguments.uses((1, "labels"))
    assert arguments.name_of((1, "m"), _net(lambda x, mask: 0)) == "mask"
    assert arguments.name_of((0,), _net(lambda x, mask: 0)) == "x"
