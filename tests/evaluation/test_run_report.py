"""How sure the figures of a report are."""

import nets
import numpy as np
import pytest
import torch

from lightning_caq import QuantizationReport, quantize
from lightning_caq.evaluation.run_report import BEFORE, certainty, retrained_report
from lightning_caq.scores import Score

FAST = {"calibration_samples": 64, "curvature_samples": 24, "bits": (2, 3, 4, 8)}


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    net = nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=60).eval()

    def evaluate(model):
        x, y = nets.images(200, 5)
        with torch.no_grad():
            right = (model(x).argmax(1) == y).float()
        return {"acc": right, "plain": float(right.mean())}

    return quantize(net, [nets.images(64, 1)[0]], avg_bits=2.5, evaluate=evaluate, guard=False, **FAST)


def test_metrics_of_samples_have_errors_and_differences_are_paired(result):
    report = result.report
    for variant in report.variants:
        p, sure = report.metrics[f"{variant}/acc"], report.certainty[f"{variant}/acc"]
        assert report.metrics[f"{variant}/plain"] == pytest.approx(p)
        assert f"{variant}/plain" not in report.certainty
        assert sure.samples == 200
        assert sure.stderr == pytest.approx((p * (1 - p) / 199) ** 0.5)
    change = report.difference("quantized", "float", "acc")
    apart = np.hypot(*(report.certainty[f"{v}/acc"].stderr for v in ("quantized", "float")))
    assert change.value == pytest.approx(report.metrics["quantized/acc"] - report.metrics["float/acc"])
    assert 0 < change.stderr < apart
    assert report.difference("quantized", "float", "plain").stderr is None


def test_output_errors_stand_beside_the_metrics_with_their_paired_ratio(result):
    errors = result.report.output_errors
    assert set(errors) == {"quantized", "uniform"}
    assert errors["quantized"].ratio is None
    ratio = errors["uniform"].ratio
    assert ratio.samples == 8  # an eighth of 64
    assert abs(np.log(errors["uniform"].value / errors["quantized"].value) - ratio.mean) < 0.7
    assert QuantizationReport.from_json(result.report.to_json()) == result.report


def test_the_calibration_objective_is_known_by_samples(result):
    assert result.report.certainty["quantized/distill"].samples == 64
    assert result.report.certainty["float/distill"].stderr == 0


def test_what_is_known_by_its_value_alone_has_no_certainty():
    assert certainty({"float": {"acc": Score(0.5)}}) == {}


def test_a_network_that_was_trained_on_has_its_figures_before_and_after(result):
    report = result.report
    once = retrained_report(report, {"acc": Score.of_samples([1.0, 0.0] * 100)})
    twice = retrained_report(once, {"acc": Score(0.75)})
    for later, accuracy in ((once, 0.5), (twice, 0.75)):
        assert later.metrics[f"{BEFORE}/acc"] == report.metrics["quantized/acc"]
        assert later.metrics["quantized/acc"] == accuracy
        assert later.certainty[f"{BEFORE}/acc"] == report.certainty["quantized/acc"]
        assert [row[0] for row in later.variant_cells()[1]] == ["float", "quantized (cet)", "uniform", BEFORE]
        assert later.layer_cells()[0] == report.layer_cells()[0]
        assert len(later.notes) == len(report.notes) + 1
    assert once.certainty["quantized/acc"].samples == 200
    assert "quantized/acc" not in twice.certainty
