"""A headless Chromium, and runs to look at in it. ``make test-browser`` installs what these tests need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import lit
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_caq import CurvatureQuantizationCallback

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: make test-browser installs it")

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory) -> Path:
    """The log folder of a short run of the callback, curvature logged during training and everything studied."""
    torch.manual_seed(0)
    logger = TensorBoardLogger(str(tmp_path_factory.mktemp("logs")), name="small")
    quantizer = CurvatureQuantizationCallback(
        avg_bits=4,
        compare=("uniform", "caq"),
        curvature_samples=32,
        monitor_every_n_epochs=1,
        guard=False,
        study=True,
    )
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=logger, callbacks=[quantizer], enable_model_summary=False,
        enable_progress_bar=False, enable_checkpointing=False, log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(lit.Classifier(), lit.train_loader(), lit.val_loader())
    return Path(logger.log_dir)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS


@pytest.fixture(scope="session")
def browser(log_dir) -> Iterator[sync_api.Browser]:
    """Debian's Chromium or Chrome if there is one, else the one that Playwright brings."""
    installed = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=installed)
        except sync_api.Error as error:
            pytest.skip(f"No Chromium can be started ({str(error).splitlines()[0]}): make test-browser installs one")
        yield found
        found.close()


@pytest.fixture
def page(browser) -> Iterator[sync_api.Page]:
    """An empty page; errors in its scripts fail the test."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        shown, errors = context.new_page(), []
        shown.on("pageerror", lambda error: errors.append(error))
        yield shown
        assert errors == []
