"""TensorBoard on the log folder of a run: each of its tabs shows what the callback wrote."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from lightning_caq.reporting.tensorboard import scalar_layout

PATIENCE = 30_000  # milliseconds; the first page of TensorBoard is large


@pytest.fixture(scope="module")
def address(log_dir, browser) -> Iterator[str]:
    """A TensorBoard that has read the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={log_dir}", f"--port={port}", "--host=127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{url}/data/plugin/images/tags", timeout=5) as answer:
                    if b"caq/bits" in answer.read():
                        break
            except OSError:
                assert server.poll() is None, "TensorBoard did not start"
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def open_tab(page, address):
    """Opens a tab of TensorBoard and waits until it shows a text."""
    page.set_default_timeout(PATIENCE)

    def opened(name: str, text: str):
        page.goto(f"{address}/#{name}")
        page.get_by_text(text).first.wait_for()
        return page

    return opened


def test_images_show_every_figure(open_tab, log_dir, screenshots) -> None:
    page = open_tab("images", "caq/bits")
    figures = {path.stem for path in (log_dir / "caq").glob("*.png")}
    assert len(figures) >= 10
    for figure in figures:
        page.get_by_text(f"caq/{figure}", exact=True).first.wait_for()
    images = page.locator("img[src*='individualImage']")
    images.nth(len(figures) - 1).wait_for()
    page.wait_for_load_state("networkidle")
    widths = images.evaluate_all("(all) => all.map((x) => x.complete ? x.naturalWidth : 0)")
    assert len(widths) == len(figures)
    assert min(widths) > 300
    page.screenshot(path=screenshots / "tensorboard-images.png")


def test_scalars_hold_bits_and_the_curves_of_training(open_tab, screenshots) -> None:
    page = open_tab("scalars", "caq/bits")
    for tag in ("caq/training/kappa/net.0", "caq/quantized/val_acc", "caq/kappa/net.0", "caq/bits/net.0"):
        page.locator("tf-tag-filterer input").first.fill(f"^{tag}$")  # the tab shows twelve tags at a time
        page.get_by_text(tag, exact=True).first.wait_for()
    page.screenshot(path=screenshots / "tensorboard-scalars.png")


def test_custom_scalars_draw_a_chart_a_family(open_tab, screenshots) -> None:
    page = open_tab("custom_scalars", "κ during training")
    page.set_viewport_size({"width": 1280, "height": 1500})  # a chart out of sight is not drawn
    for title in scalar_layout()["caq"]:
        page.get_by_text(title, exact=True).first.wait_for()
    curves = page.get_by_text("Matches (2)")  # two layers a chart
    curves.nth(len(scalar_layout()["caq"]) - 1).wait_for()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(3000)  # curves are drawn a while after their data came
    page.screenshot(path=screenshots / "tensorboard-custom-scalars.png")


def test_text_shows_the_summary_and_its_tables(open_tab, screenshots) -> None:
    page = open_tab("text", "caq/summary")
    page.get_by_text("bits a weight on average").first.wait_for()
    heads = page.locator("table th").all_inner_texts()
    assert {"network", "layer", "κ", "bits"} <= {head.strip() for head in heads}
    page.screenshot(path=screenshots / "tensorboard-text.png")


def test_histograms_compare_weights_before_and_after(open_tab, screenshots) -> None:
    page = open_tab("histograms", "caq/weights/net.0/before")
    page.get_by_text("caq/weights/net.0/after", exact=True).first.wait_for()
    page.screenshot(path=screenshots / "tensorboard-histograms.png")
