"""Two processes under DDP: one plan, one network, one set of files, and the plan that one process would make."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ddp_script
import pytest
import torch
from lit import blobs

from lightning_caq.plan import QuantizationPlan

SCRIPT = Path(ddp_script.__file__)
LIMIT = 300  # seconds until it counts as a hang
STATES = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks have left their findings and their files."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {name: value for name, value in os.environ.items() if name not in STATES}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "console").open("w+") as console:
        # A session of its own, so that a hang is ended together with the rank that Lightning started.
        program = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=environment, stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            ended = program.wait(LIMIT)
        except subprocess.TimeoutExpired:
            ended = f"none in {LIMIT} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        console.seek(0)
        assert ended == 0, f"exit status {ended}\n{console.read()[-4000:]}"
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ddp_script.RANKS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the weights of ``Steady`` and the training data of rank 0."""
    return ddp_script.steady(tmp_path_factory.mktemp("alone"))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def figures(profile):
    """All that was measured, as one flat list of names and values."""
    layers = [(f"{row['name']}.{k}", v) for row in profile["layers"] for k, v in row.items()]
    rest = [(k, v) for k, v in profile.items() if k not in ("layers", "seconds", "fingerprint")]
    for name, value in layers + rest:
        if isinstance(value, dict):
            yield from ((f"{name}.{k}", v) for k, v in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}.{k}", v) for k, v in enumerate(value))
        else:
            yield name, value


def test_every_rank_calibrates_on_the_batches_of_rank_zero(ranks, alone):
    own = {float(x) for batch in ddp_script.shard(1) for x in batch[0].flatten()}
    for rank in ranks:
        drawn = rank["steady"]["drawn"]
        assert sum(len(x) for x, _ in drawn) == 32
        for batch, expected in zip(drawn, alone["drawn"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
        assert not own & {float(v) for x, _ in drawn for v in x.flatten()}


def test_ranks_measure_and_decide_what_one_process_does(ranks, alone):
    expected = dict(figures(json.loads(alone["profile"])))
    assert expected["net.0.kappa"] > 0
    assert expected["net.0.lipschitz"] > 0
    assert expected["eigenvalues.0"] > 0
    for rank in ranks:
        assert rank["steady"]["bits"] == alone["bits"]
        found = dict(figures(json.loads(rank["steady"]["profile"])))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # What is nought but for rounding noise has no relative error.
            close = pytest.approx(value, rel=1e-4, abs=1e-9) if isinstance(value, float) else value
            assert found[name] == close, name
        assert_same(rank["steady"]["tensors"], alone["tensors"])


def test_compared_methods_are_validated_on_the_data_of_all_ranks(ranks, tmp_path):
    """As one process does on all the data; each rank runs the extra loops on its half of them."""
    expected = ddp_script.compared(tmp_path)
    wanted = json.loads(expected["report"])
    assert wanted["metrics"].keys() == {
        f"{variant}/{name}"
        for variant in ("float", "quantized", "uniform", "caq")
        for name in ("val_acc", "val_loss", "distill")
    }
    assert len({wanted["metrics"][f"{variant}/val_loss"] for variant in ("float", "quantized", "uniform")}) == 3
    for rank in (each["compared"] for each in ranks):
        report = json.loads(rank["report"])
        assert report["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-8)
        assert [row["bits"] for row in report["layers"]] == [row["bits"] for row in wanted["layers"]]
        assert report["sizes"] == wanted["sizes"]
        assert rank["logged"]["val_loss"] == pytest.approx(wanted["metrics"]["float/val_loss"], rel=1e-5)
    assert_same(ranks[0]["compared"]["state"], ranks[1]["compared"]["state"])


def test_ranks_share_one_profile(ranks):
    """To the last digit, and with the seconds of rank 0."""
    assert ranks[0]["steady"]["profile"] == ranks[1]["steady"]["profile"]


@pytest.mark.parametrize("place", ddp_script.BROKEN)
def test_a_failure_on_one_rank_leaves_the_float_network_on_all(ranks, place):
    failing, _, _ = ddp_script.BROKEN[place]
    for rank, result in enumerate(rank["broken"][place] for rank in ranks):
        kind, text = result["end"]
        assert kind == ("OSError" if rank == failing else "CalibrationError")
        assert text == f"no {place}" or text.endswith(f"because rank {failing} failed with OSError: no {place}")
        assert result["types"] == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
        assert result["changed"] == []
        assert result["seconds"] < 30


def test_ranks_hold_the_same_quantized_network(ranks):
    first, second = (rank["steady"] for rank in ranks)
    assert first["bits"] == second["bits"]
    assert_same(first["tensors"], second["tensors"])
    assert_same(first["state"], second["state"])


def test_ranks_that_came_to_other_results_hold_the_plan_of_rank_zero(ranks):
    """Rank 1 is given a smaller budget and another rounding, far more than two devices ever differ."""
    ours, theirs = (rank["apart"]["first"] for rank in ranks)
    reports = [json.loads(x["report"])["sizes"]["quantized"] for x in (ours, theirs)]
    assert reports[0] != reports[1]  # they did come to other results
    assert ours["bits"] == theirs["bits"] == {"net.0": 2, "net.4": 3}
    assert_same(ours["tensors"], theirs["tensors"])
    weights = {k: v for k, v in ours["state"].items() if "running" not in k}
    assert_same(weights, {k: theirs["state"][k] for k in weights})


@pytest.mark.parametrize("fit", ["first", "second"])
def test_batch_norm_statistics_that_drifted_apart_are_brought_together(ranks, fit):
    """Each rank's last training step moves its own statistics; DDP shares them only ahead of the next one."""
    ours, theirs = (rank["apart"][fit] for rank in ranks)
    assert not torch.equal(ours["before"]["net.1.running_mean"], theirs["before"]["net.1.running_mean"])
    assert_same(ours["state"], theirs["state"])
    assert_same(ours["tensors"], theirs["tensors"])


def test_training_on_moves_the_codes(ranks):
    tensors = [ranks[0]["apart"][fit]["tensors"] for fit in ("first", "second")]
    assert not torch.equal(*(x["codes/net.0"] for x in tensors))
    assert torch.equal(*(x["scale/net.0"] for x in tensors))


def test_a_test_afterwards_runs_the_quantized_network_on_every_rank(ranks, folder, alone):
    plan = QuantizationPlan.load(next((folder / "steady").rglob("plan.json")))
    torch.manual_seed(0)
    network = ddp_script.Steady().eval()
    inputs, labels = blobs(48, seed=1).tensors
    with torch.no_grad():
        float_outputs = network(inputs)
        plan.apply(network)
        outputs = network(inputs)
    assert not torch.allclose(outputs, float_outputs, atol=1e-2)
    for rank in ranks:
        result = rank["steady"]
        assert result["quantizing"] == [{"net.0": True, "net.4": True}]
        assert torch.allclose(result["test_outputs"], outputs, atol=1e-6)
        assert result["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)), rel=1e-5)


def test_rank_zero_alone_writes_and_every_file_once(ranks, folder):
    (directory,) = {path.parent for path in (folder / "steady").rglob("plan.json")}
    # Those that begin with a dot are on their way to their place.
    written = [sorted(name for name in rank["steady"]["files"] if name[0] != ".") for rank in ranks]
    assert written == [sorted(path.name for path in directory.iterdir()), []]
    assert {"plan.json", "plan.safetensors", "profile.json", "report.json"} <= set(written[0])
    assert (folder / "console").read_text().count("caq: plan, report and figures are in") == 4  # four fits
    assert json.loads((directory / "profile.json").read_text()) == json.loads(ranks[0]["steady"]["profile"])
