from __future__ import annotations

import json
from dataclasses import asdict, replace

import nets
import pytest
import torch

from lightning_caq import quantize
from lightning_caq.evaluation.studies import study
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import objective_from
from lightning_caq.report import QuantizationReport
from lightning_caq.studies import Studies


@pytest.fixture
def studied():
    torch.manual_seed(1)
    net, batches = nets.small_cnn().eval(), [torch.randn(24, 1, 8, 8), torch.randn(8, 1, 8, 8)]
    result = quantize(net, batches, avg_bits=3, inplace=False, compare=())
    layers = find_layers(net, batches[0])
    before = {key: x.clone() for key, x in net.state_dict().items()}
    reference = make_reference(net, batches)
    found = study(
        net, layers, objective=objective_from("distill", reference), reference=reference, profile=result.profile,
        plan=result.plan, bits=(2, 4),
    )  # fmt: skip
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    return net, result, found


def test_a_study_of_a_run_holds_every_part(studied) -> None:
    net, result, found = studied
    names = list(result.plan.bits)
    assert list(found.alone) == names
    assert all(x > 0 for x in found.alone.values())
    assert list(found.energies) == names
    assert list(found.tightness) == [2, 4]
    assert found.tightness[2].observed > found.tightness[4].observed
    # The landscape's path follows the plan: it ends as far out as the plan's weights are from the float ones.
    far = sum(
        float((x.values - net.get_parameter(f"{x.name}.weight").detach()).square().sum()) for x in result.plan.layers
    )
    s, t = found.landscape.path[-1]
    assert s * s + t * t == pytest.approx(far, rel=1e-4)


def test_studies_go_with_the_report_through_json(studied) -> None:
    _, result, found = studied
    report = replace(result.report, studies=found)
    assert QuantizationReport.from_json(report.to_json()) == report
    assert Studies.from_dict(json.loads(json.dumps(asdict(Studies())))) == Studies()


def test_a_report_from_before_there_were_studies_is_read(studied) -> None:
    _, result, _ = studied
    data = json.loads(result.report.to_json())
    del data["studies"]
    assert QuantizationReport.from_json(json.dumps(data)).studies == Studies()
