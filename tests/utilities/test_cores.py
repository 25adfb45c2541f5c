"""Free cores, by clocks of the system."""

import time
from unittest import mock

from lightning_caq.utilities import cores
from lightning_caq.utilities.cores import CpuTimes, crowded, free_cores, usable_cores


def test_cores_that_others_use_are_not_free():
    with mock.patch.object(cores, "usable_cores", return_value=8.0):
        start = CpuTimes(0.0, 0.0, 0.0)
        assert free_cores(start, CpuTimes(2.0, 10.0, 4.0)) == 5.0  # others took 6 seconds of 2
        assert free_cores(start, CpuTimes(2.0, 4.0, 4.0)) == 8.0
        assert free_cores(start, CpuTimes(0.1, 9.0, 0.0)) == 8.0  # too short to tell
        assert free_cores(start, CpuTimes(1.0, 99.0, 0.0)) == 1.0


def test_clocks_run():
    before = CpuTimes.now()
    if before is None:
        assert not cores._STAT.exists()
        return
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        pass
    after = CpuTimes.now()
    assert after.process - before.process > 0.02
    assert after.machine >= before.machine


def test_a_quota_of_the_container_counts(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    with mock.patch.object(cores, "_QUOTA", quota):
        assert usable_cores() == 1.0


def test_more_threads_than_free_cores_are_said():
    assert "torch.set_num_threads(2)" in crowded(8, 2.2)
    assert crowded(2, 2.2) == crowded(1, 1.0) == ""
