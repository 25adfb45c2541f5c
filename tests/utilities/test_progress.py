"""What is said of work that goes on, and when."""

import io
import time
import warnings
from unittest import mock

import pytest

from lightning_caq.notes import Note
from lightning_caq.utilities import progress as module
from lightning_caq.utilities.progress import Progress


def _expecting(said, **options):
    progress = Progress(said.append, **options)
    progress.headline = "2 layers; "
    progress.expect("networks", 10.0, times=2, steps=("rounding",))
    progress.expect("studies", 20.0)
    return progress


def test_the_estimate_is_the_sum_of_its_parts_and_is_given_once():
    said = []
    progress = _expecting(said)
    progress.announce("measuring")
    assert progress.expected == 40
    assert said == ["caq: 2 layers; measuring: about 41 s (networks 21 s, studies 21 s)"]


def test_after_an_estimate_lines_come_now_and_then_with_what_is_left():
    said, clock = [], mock.Mock(return_value=0.0)
    with mock.patch.object(time, "perf_counter", clock):
        progress = _expecting(said)
        progress.announce("measuring")
        for name in ("rounding (cet)", "rounding (uniform)", "studies"):
            with progress.step(name):
                clock.return_value += 2.0  # two of them are longer than it may be quiet
    assert said[1:] == ["caq: studies ... (about 21 s left)"]
    assert set(progress.seconds) == {"rounding (cet)", "rounding (uniform)", "studies"}


def test_a_bar_takes_the_place_of_lines():
    said, screen = [], io.StringIO()
    progress = _expecting(said, bar=True)
    with mock.patch("sys.stderr", screen):
        progress.announce("measuring")
        with mock.patch.object(module, "QUIET", -1.0), progress.step("rounding (cet)"):
            pass
        assert progress._bar.n == pytest.approx(10)
        progress._bar.refresh()
        progress.close()
    assert len(said) == 1
    assert "rounding (cet)" in screen.getvalue()
    assert "25%" in screen.getvalue()


def test_a_note_comes_once_whoever_brings_it():
    said, told = [], set()
    for _ in range(2):
        Progress(said.append, told=told).tell(Note("Done."))
    assert said == ["caq: Done."]
    with pytest.warns(UserWarning, match="caq: Look"):
        Progress(told=told).tell(Note("Look.", "warning"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Progress(told=told).tell(Note("Look.", "warning"))
