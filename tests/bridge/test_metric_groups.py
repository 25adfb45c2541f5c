"""torchmetrics by groups: against the same metrics of resampled data."""

import torch
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from lightning_caq.bridge.metric_groups import MetricGroups


def _data(n=256):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) * 3 // n  # sorted
    logits = torch.nn.functional.one_hot(labels, 3) + torch.randn(n, 3, generator=generator)
    return logits, labels


def _grouped(metric, a, b, groups=64, batch=32):
    grouped, order = MetricGroups(metric), torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
    for start in range(0, len(a), batch):
        parts = {}
        for i in range(min(batch, len(a) - start)):
            parts.setdefault(int(order[start + i]) % groups, []).append(i)
        args = a[start : start + batch], b[start : start + batch]
        grouped.add(args, {}, parts, samples=len(args[0]), whole=start)
    return grouped


def _bootstrap(metric, a, b, draws=300):
    generator = torch.Generator().manual_seed(2)
    values = []
    for _ in range(draws):
        chosen = torch.randint(len(a), (len(a),), generator=generator)
        metric.reset()
        metric.update(a[chosen], b[chosen])
        values.append(metric.compute())
    return float(torch.stack(values).std())


def test_standard_errors_are_those_of_a_bootstrap():
    """64 groups give an error to 9 %, 300 draws one to 4 %."""
    logits, labels = _data()
    cases = [
        (MulticlassAccuracy(3, average="micro"), logits, labels),
        (MulticlassF1Score(3, average="macro"), logits, labels),
        (BinaryAUROC(), logits[:, 0].sigmoid(), (labels == 0).long()),  # keeps lists
        (MeanSquaredError(), logits[:, 0].contiguous(), labels.float()),
    ]
    for metric, a, b in cases:
        value = float(metric(a, b))
        score = _grouped(metric, a, b).score(value)
        assert score.samples == 256
        assert abs(score.stderr / _bootstrap(metric, a, b) - 1) < 0.3, type(metric).__name__


def test_one_sample_a_group_gives_the_closed_form_of_an_accuracy():
    logits, labels = _data(60)
    metric = MulticlassAccuracy(3, average="micro")
    p = float(metric(logits, labels))
    score = _grouped(metric, logits, labels, groups=60)
    assert abs(score.score(p).stderr - (p * (1 - p) / 59) ** 0.5) < 1e-6


def test_a_sample_of_several_rows_stays_whole():
    """Ten equal rows a sample tell no more than one."""
    logits, labels = _data(64)
    metric = MulticlassAccuracy(3, average="micro")
    once, grouped = _grouped(metric, logits, labels), MetricGroups(metric)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    many = logits.repeat_interleave(10, 0), labels.repeat_interleave(10)
    grouped.add(many, {}, {int(order[i]) % 64: [i] for i in range(64)}, samples=64, whole=0)
    assert abs(grouped.score().stderr - once.score().stderr) < 1e-6


def test_what_cannot_be_cut_is_a_group_by_itself_and_the_metric_is_left_alone():
    metric = MeanSquaredError()
    grouped = MetricGroups(metric)
    for i in range(8):
        grouped.add((torch.full((3,), float(i)), torch.zeros(3)), {}, {0: [0], 1: [1]}, samples=2, whole=i)
    assert len(grouped.score().groups) == 8
    assert metric.update_count == 0


def test_groups_that_do_not_give_the_value_again_are_not_used():
    logits, labels = _data(64)
    assert _grouped(MulticlassAccuracy(3), logits, labels).score(0.123) is None


def test_a_metric_with_a_network_is_not_taken():
    metric = MeanSquaredError()
    assert MetricGroups.can_take(metric)
    metric.net = torch.nn.Linear(1, 1)
    assert not MetricGroups.can_take(metric)
