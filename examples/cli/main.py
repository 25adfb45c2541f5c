"""Quantize from the command line: a LightningCLI program, of which one line is about quantization.

The callback comes from YAML, or from the command line alone; ``short_errors`` is there for the sake of whoever mistypes
an option of it::

    python examples/cli/main.py fit --config examples/cli/mlp.yaml
    python examples/cli/main.py fit --config examples/cli/cnn.yaml
    python examples/cli/main.py fit --config examples/cli/resnet.yaml
    python examples/cli/main.py fit --config examples/cli/cnn.yaml --trainer.callbacks.avg_bits=2.25

    python examples/cli/main.py fit --trainer.max_epochs=3 \
        --trainer.callbacks+=lightning_caq.CurvatureQuantizationCallback --trainer.callbacks.avg_bits=3

    python examples/cli/main.py fit --config examples/cli/cnn.yaml --print_config
"""

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

from lightning_caq.errors import short_errors

sys.path.insert(0, str(Path(__file__).parents[1]))  # the network and the data are those of the other examples

from data import Digits
from models import Classifier

if __name__ == "__main__":
    with short_errors():
        LightningCLI(Classifier, Digits, seed_everything_default=0, parser_kwargs={"exit_on_error": False})
