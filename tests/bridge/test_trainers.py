"""What is asked of a Trainer before work starts."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
from lit import trainer

from lightning_caq.bridge import trainers

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


@BOTH
def test_late_averaging_is_warned_of(tmp_path, package):
    swa = package.callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    callback = package.Callback()
    late = trainer(tmp_path, package, callbacks=[callback, swa])
    with pytest.warns(UserWarning, match="StochasticWeightAveraging comes after"):
        trainers.warn_of_late_averaging(late, callback)
    trainers.warn_of_late_averaging(trainer(tmp_path, package, callbacks=[swa, callback]), callback)
