"""The callback from the command line, with the programs of ``examples/``."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningCLI
from lit import classifier, train_loader, val_loader

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.plan import QuantizationPlan

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLBACK = "lightning_caq.CurvatureQuantizationCallback"
BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
pytestmark = [
    # LightningCLI's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:caq. Error feedback is fitted to"),  # few samples, for speed
    pytest.mark.filterwarnings("ignore:.*checkpoint callbacks directory|.*Checkpoint directory"),
]


def by_hand_loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def program(path, arguments, monkeypatch, folder):
    """Run an example as ``python path arguments`` would, in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(path), run_name="__main__")


QUICK = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=10",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks.calibration_samples=64",
    "--trainer.callbacks.curvature_samples=16",
    "--trainer.callbacks.guard=false",
]


CONFIGS = {
    "mlp": ("caq", "ratio=10"),
    "cnn": ("cet", "avg_bits=2.5"),
    "resnet": ("cet", "avg_bits="),  # what max_drop came to
}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """``example("cnn", "--option=value", ...)`` fits in ``tmp_path`` with that configuration."""

    def run(config, *arguments):
        file = config if isinstance(config, Path) else EXAMPLES / "cli" / f"{config}.yaml"
        program(EXAMPLES / "cli" / "main.py", ["fit", "--config", str(file), *arguments], monkeypatch, tmp_path)

    return run


@pytest.mark.parametrize("config", CONFIGS)
def test_the_example_program_quantizes(tmp_path, example, no_figures, config):
    example(config, *QUICK)
    plan = QuantizationPlan.load(tmp_path / "demo_logs" / f"cli_{config}" / "version_0" / "caq" / "plan.json")
    assert plan.method == CONFIGS[config][0]
    assert plan.budget.startswith(CONFIGS[config][1])


@pytest.mark.filterwarnings("ignore:caq. .* does nothing, because another")
def test_a_second_callback_from_the_command_line_takes_over(tmp_path, example, no_figures):
    example("cnn", f"--trainer.callbacks+={CALLBACK}", "--trainer.callbacks.avg_bits=3", *QUICK)
    plan = QuantizationPlan.load(tmp_path / "demo_logs" / "cli_cnn" / "version_0" / "caq" / "plan.json")
    assert (plan.method, plan.budget) == ("cet", "avg_bits=3")


@pytest.mark.parametrize(
    ("argument", "words"), [("avg_bits=three", "float"), ("avgbits=3", "avgbits"), ("rounding=up", "up")]
)
def test_a_mistyped_option_is_told_without_a_page_of_usage(example, capsys, argument, words):
    with pytest.raises(SystemExit) as end:
        example("cnn", f"--trainer.callbacks.{argument}", *QUICK)
    assert argument.split("=")[0] in end.value.code
    assert words in end.value.code
    assert len(end.value.code.splitlines()) <= 3
    assert "usage" not in capsys.readouterr().err
    if argument == "avgbits=3":
        assert end.value.code == "CurvatureQuantizationCallback has no option 'avgbits'; did you mean 'avg_bits'?"


@BOTH
def test_a_value_that_is_not_allowed_is_one_line_without_any_wrapper(tmp_path, package):
    from pytorch_lightning.cli import LightningCLI as OtherCLI

    kind = LightningCLI if package is lightning.pytorch else OtherCLI
    for options, sentence in (
        ({"avg_bits": 3, "method": "magic"}, "method='magic' is not known; choose from .*"),
        ({"avg_bits": 99}, "avg_bits=99 cannot be met with .*"),
        ({"avg_bits": 3, "bits": [0]}, "bits=.* is not allowed; .*"),
        ({"avg_bits": 3, "monitor_every_n_epochs": -1}, "monitor_every_n_epochs=-1 is not allowed; .*"),
    ):
        settings = {"accelerator": "cpu", "callbacks": [{"class_path": CALLBACK, "init_args": options}]}
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"trainer": settings}))
        arguments = {"args": ["--config", str(tmp_path / "wrong.yaml")], "run": False}
        with pytest.raises(SystemExit) as end:
            kind(classifier(package), **arguments)
        assert re.fullmatch(sentence, end.value.code)
        with pytest.raises(Exception, match=sentence):  # for a parser that is not to end the program
            kind(classifier(package), parser_kwargs={"exit_on_error": False}, **arguments)


def printed_config(example, capsys, config):
    with pytest.raises(SystemExit) as end:
        example(config, "--print_config")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS)
def test_the_printed_configuration_read_back_prints_the_same(tmp_path, example, capsys, config):
    printed = printed_config(example, capsys, config)
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    given = yaml.safe_load((EXAMPLES / "cli" / f"{config}.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert callback["class_path"] == CALLBACK
    assert callback["init_args"].items() >= given.items()
    assert callback["init_args"].keys() == inspect.signature(CurvatureQuantizationCallback).parameters.keys()
    assert callback["init_args"]["rounding"] == "error_feedback"  # what is not given is there too
    CurvatureQuantizationCallback(**callback["init_args"])
    (tmp_path / "printed.yaml").write_text(printed)
    assert printed_config(example, capsys, tmp_path / "printed.yaml") == printed


def test_help_tells_of_every_option(example, capsys):
    from lightning_caq.utilities.keywords import attribute_texts

    with pytest.raises(SystemExit) as end:
        example("cnn", f"--trainer.callbacks.help={CALLBACK}")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in attribute_texts(CurvatureQuantizationCallback, "Args").items():
        assert f".{name} " in shown
        assert text[:40] in shown, name


def test_the_first_example_runs(tmp_path, monkeypatch, capsys):
    program(
        EXAMPLES / "01_callback.py",
        ["--network", "mlp", "--epochs", "1", "--curvature-samples", "16"],
        monkeypatch,
        tmp_path,
    )
    printed = capsys.readouterr().out
    assert "quantized (cet)" in printed
    assert "tensorboard --logdir demo_logs" in printed
    assert (tmp_path / "demo_logs" / "mlp" / "version_0" / "caq" / "plan.json").exists()


@BOTH
def test_every_argument_can_be_said_in_yaml(tmp_path, package):
    from pytorch_lightning.cli import LightningCLI as OtherCLI

    kind = LightningCLI if package is lightning.pytorch else OtherCLI
    module = classifier(package)
    module.train_dataloader = lambda self: train_loader()
    module.val_dataloader = lambda self: val_loader()
    options = {
        "method": "caq", "ratio": 2.0, "bits": [3, 4, 8], "rounding": "nearest", "batchnorm": "keep",
        "objective": "task", "calibration_samples": 48, "curvature_samples": 24, "eigenpairs": 8,
        "loss_fn": f"{__name__}.by_hand_loss", "evaluate": False, "compare": ["uniform", "cet"],
        "monitor_every_n_epochs": 1, "include": ["net.*"], "exclude": ["net.4"], "seed": 3,
    }  # fmt: skip
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
        "callbacks": [{"class_path": CALLBACK, "init_args": options}],
    }  # fmt: skip
    cli = kind(
        module,
        args=["fit", f"--trainer={yaml.safe_dump(settings, default_flow_style=True)}"],
        save_config_callback=None,
    )
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, CurvatureQuantizationCallback))
    assert callback.loss_fn is by_hand_loss
    assert callback.options.bits == (3, 4, 8)
    assert set(callback.plan.bits) == {"net.0"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "magic"}, r"method='magic' is not known; choose from 'caq', .*'zeroq'\."),
        (
            {"avg_bits": 99},
            r"avg_bits=99.* cannot be met with bits=.*; choose a value from 2 to 8, or add bit-widths\.",
        ),
        ({"bits": [0]}, r"bits=.* from 1 to 8.*"),
    ],
)
def test_a_wrong_option_in_yaml_ends_in_one_sentence(tmp_path, example, options, sentence):
    settings = yaml.safe_load((EXAMPLES / "cli" / "cnn.yaml").read_text())
    settings["trainer"]["callbacks"][0]["init_args"].update(options)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        example(tmp_path / "wrong.yaml")
    assert re.fullmatch(sentence, end.value.code), end.value.code


def test_no_trainer_gets_the_callback_unasked():
    """Lightning adds what these entry points name to every Trainer of the environment."""
    for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
        assert not [x for x in metadata.entry_points(group=group) if x.value.startswith("lightning_caq")]
