"""Memory that is handed back, as the system counts it."""

import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_caq.utilities.memory import release_memory


def _resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="only the GNU allocator keeps memory for each thread")
def test_what_threads_have_freed_goes_back_to_the_system():
    kept = []

    def use():
        blocks = [torch.zeros(15_000) for _ in range(500)]  # 30 MB in blocks too small to be mapped one by one
        kept.append(blocks[-1])  # at the end of what the thread was given, so that the rest cannot shrink away

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = _resident()
    release_memory()
    assert before - _resident() > 60e6
    assert all(bool((block == 0).all()) for block in kept)
