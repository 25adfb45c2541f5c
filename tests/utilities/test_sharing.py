"""Several processes divide the work: the profile of one process on all of them, and no hang when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import sharing_script as script
import torch
from every import every

from lightning_caq.utilities.sharing import ALONE, Sharing

LIMIT = 300  # seconds until it counts as a hang
# Sums over batches and layers are taken in another order, in float64, and Lanczos and Hutch++ go on from there.
CLOSE = {"rel": 1e-8, "abs": 1e-12}
# What needs a product with the Hessian or the matrix of all layers; all the rest is the very same number.
SUMMED = {
    "trace", "trace_stderr", "subspace_curvature", "subspace_energy", "second_order", "first_order", "eigenvalues",
    "eigenvalue_residuals", "residual_curvature", "density", "density_stderr",
}  # fmt: skip


def launch(folder, ranks):
    """What every one of some processes found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(script.__file__)), str(folder)]
    consoles = [(folder / f"console{rank}").open("w+") for rank in range(ranks)]
    programs = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)], env=environment, stdout=console, stderr=console, start_new_session=True
        )
        for rank, console in enumerate(consoles)
    ]
    try:
        ended = [program.wait(LIMIT) for program in programs]
    except subprocess.TimeoutExpired:
        ended = [f"none in {LIMIT} s"]
    finally:
        for program in programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        for console in consoles:
            console.close()
    assert ended == [0] * ranks, [Path(console.name).read_text(encoding="utf-8")[-2000:] for console in consoles]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """Of two ranks, and of three: more than some networks have layers, and some batches samples."""
    return request.getfixturevalue("two") if request.param == 2 else launch(tmp_path_factory.mktemp("three"), 3)


def figures(text):
    """All that was measured, as names of fields, names and values."""
    profile = json.loads(text)
    profile.pop("seconds")
    rows = [(field, f"{row['name']}.{field}", x) for row in profile.pop("layers") for field, x in row.items()]
    for field, name, value in rows + [(field, field, x) for field, x in profile.items()]:
        yield from ((field, *leaf) for leaf in leaves(name, value))


def leaves(name, value):
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield name, value
    else:
        for key, x in inner:
            yield from leaves(f"{name}.{key}", x)


@every("objective", script.OBJECTIVES)
@every("name", script.SIZES)
def test_every_rank_has_the_profile_of_one_process(found, name, objective):
    texts = [rank["profiles"][name, objective] for rank in found]
    assert len(set(texts)) == 1  # to the last digit, seconds included
    expected = list(figures(script.profile(name, objective).to_json()))
    ours = list(figures(texts[0]))
    assert [k for _, k, _ in ours] == [k for _, k, _ in expected]
    for (field, k, value), (_, _, other) in zip(expected, ours, strict=True):
        close = field in {*SUMMED, "groups"} and isinstance(value, float)
        assert other == (pytest.approx(value, **CLOSE) if close else value), k


@every("objective", script.OBJECTIVES)
@every("name", script.SIZES)
def test_products_are_those_of_the_dense_hessian(found, name, objective):
    case = script.case(name)
    dense = nets.Dense(case.net, [layer.name for layer in script.find_layers(case.net, case.batches[0])])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    hessian = dense.hessian(loss)
    v = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    blocks = zip(dense.blocks(hessian), v.split(dense.sizes), strict=True)
    slope = torch.func.grad(lambda w: loss(dense.call(w)))(dense.vector)
    expected = {"product": hessian @ v, "layers": torch.cat([b @ part for b, part in blocks]), "gradient": slope}
    assert expected["product"].norm() > 1e-3
    for rank in found:
        for kind, parts in rank["products"][name, objective].items():
            flat = torch.cat([part.flatten() for part in parts])
            torch.testing.assert_close(flat, expected[kind.split(",")[0]], rtol=1e-8, atol=1e-10)


def test_each_rank_does_its_part_only(found):
    parts = [(rank["dealt"]["layers"], rank["dealt"]["batches"]) for rank in found]
    assert parts == ([(2, 2), (1, 1)] if len(found) == 2 else [(1, 1)] * 3)


@every("place", script.FAILURES)
def test_a_failure_on_one_rank_is_raised_on_both(two, place):
    (kind, text, seconds, kept), own = (rank["failures"][place] for rank in two)
    assert own[:2] == ("ZeroDivisionError", f"call {script.FAILURES[place][1]}")
    assert kind == "CalibrationError"
    assert f"because rank 1 failed with ZeroDivisionError: {own[1]}" in text
    assert max(seconds, own[2]) < 10
    assert kept
    assert own[3]


def test_a_block_fails_on_all_ranks_or_on_none(two):
    ends = {name: [rank["together"][name] for rank in two] for name in two[0]["together"]}
    assert [end[0] for end in ends["first"]] == ["KeyError", "CalibrationError"]
    assert ends["first"][1][1] == "Stopped at 'after', because rank 0 failed with KeyError: 'a'"
    assert [end[0] for end in ends["inner"]] == ["CalibrationError", "OSError"]
    assert ends["inner"][0][1] == "Stopped at 'end of inner', because rank 1 failed with OSError: b"
    assert [end[0] for end in ends["interrupt"]] == ["CalibrationError", "KeyboardInterrupt"]
    assert [end[0] for end in ends["everywhere"]] == ["KeyError", "OSError"]


def test_ranks_at_different_places_are_told(two):
    for rank in two:
        kind, text, _ = rank["together"]["astray"]
        assert kind == "CalibrationError"
        assert "rank 0 at 'place 0', rank 1 at 'place 1'" in text


def test_exchanges_work_after_failures(two):
    for rank in two:
        found = rank["together"]
        assert found["sum"].tolist() == [2.0, 10.0]
        assert found["gather"] == {"of 0": 0, "of 1": 1}
        assert found["first value"] == "of 0"


def test_rank_zero_decides_for_all(two):
    """Whether an earlier profile is used, though the other rank has none, and how many samples there is time for."""
    for rank in two:
        assert rank["reuse"] == {"kept": {0: True, 1: False}, "samples": 1}


def test_items_are_dealt_out_whole():
    for size in range(1, 6):
        parts = [Sharing(rank, size).mine(range(4)) for rank in range(size)]
        assert sorted(item for part in parts for item in part) == [0, 1, 2, 3]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ALONE.mine("abc") == ["a", "b", "c"]


def test_alone_errors_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), ALONE.agreed("block"):
        raise ZeroDivisionError
