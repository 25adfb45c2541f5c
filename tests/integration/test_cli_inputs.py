"""Both forms of ``activation_bits`` in a configuration file."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml
from lit import classifier

from lightning_caq import CurvatureQuantizationCallback

CALLBACK = "lightning_caq.CurvatureQuantizationCallback"
pytestmark = [
    # LightningCLI's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
@pytest.mark.parametrize("bits", [4, "mixed", None])
def test_bits_of_inputs_are_a_number_or_a_word(tmp_path, package, bits):
    from lightning.pytorch.cli import LightningCLI
    from pytorch_lightning.cli import LightningCLI as OtherCLI

    kind = LightningCLI if package is lightning.pytorch else OtherCLI
    callback = {"class_path": CALLBACK, "init_args": {"bops": 0.5, "activation_bits": bits}}
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": [callback]}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": trainer}))
    cli = kind(classifier(package), args=["--config", str(config)], run=False, seed_everything_default=False)
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, CurvatureQuantizationCallback)]
    assert found.options.activation_bits == bits
    assert type(found.options.activation_bits) is type(bits)


def test_another_word_is_refused(tmp_path, capsys):
    from lightning.pytorch.cli import LightningCLI

    callback = {"class_path": CALLBACK, "init_args": {"bops": 0.5, "activation_bits": "many"}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit):
        LightningCLI(classifier(), args=["--config", str(config)], run=False, seed_everything_default=False)
    assert "activation_bits" in capsys.readouterr().err
