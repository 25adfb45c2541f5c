"""What several measures share is computed once, and anew for other samples."""

from dataclasses import replace

from torch import nn

from lightning_caq.measures.measurement import Measurement
from lightning_caq.network.objective import make_objective


def test_a_result_is_shared_and_not_handed_on_to_a_changed_measurement():
    net = nn.Linear(2, 1)
    calls = []

    def count(measurement):
        calls.append(measurement.seed)
        return len(calls)

    first = Measurement(net, [], make_objective("distill", net, []))
    assert (first.once(count), first.once(count)) == (1, 1)
    assert replace(first, seed=1).once(count) == 2
    assert calls == [0, 1]
