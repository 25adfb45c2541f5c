"""Standard errors against closed forms and a bootstrap."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_caq.scores import Difference, Score, as_scores, jackknife_stderr, log_ratio


def test_the_standard_error_of_a_mean_is_the_closed_form():
    for seed in range(5):
        x = np.random.default_rng(seed).exponential(size=40)
        score = Score.of_samples(x)
        assert float(score) == pytest.approx(x.mean())
        assert score.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(40))
        assert score.samples == 40


def test_groups_of_unequal_sizes_give_the_error_of_the_mean_over_repetitions():
    """Means of 30 groups of 1 to 9 samples, 2,000 times: the estimate is the spread that is seen, to 3 %."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, 30)
    means, variances = [], []
    for _ in range(2000):
        score = Score.of_means([rng.normal(size=m).mean() for m in sizes], sizes)
        means.append(float(score))
        variances.append(score.stderr**2)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.1)
    assert np.mean(variances) == pytest.approx(1 / sizes.sum(), rel=0.03)


def test_a_ratio_of_sums_is_as_sure_as_its_bootstrap_says():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(size=200), 1 + rng.exponential(size=200)
    without = [np.delete(a, i).sum() / np.delete(b, i).sum() for i in range(200)]
    draws = rng.integers(0, 200, (4000, 200))
    score = Score.of_parts(a.sum() / b.sum(), without, np.ones(200))
    assert score.stderr == pytest.approx(np.std(a[draws].sum(1) / b[draws].sum(1)), rel=0.06)


def test_two_standard_errors_hold_the_truth_as_often_as_they_should():
    """Of 1,000 means of 100 samples, and of as many paired differences, about 95 % are within two."""
    rng = np.random.default_rng(2)
    within = {"alone": 0, "paired": 0}
    for _ in range(1000):
        common = rng.normal(size=100)
        a, b = (Score.of_samples(common + 0.1 * rng.normal(size=100)) for _ in range(2))
        within["alone"] += abs(a) < 2 * a.stderr
        difference = a.less(b)
        within["paired"] += difference.within_noise
        assert difference.stderr < 0.05  # not 0.14, which it is without pairs
    assert all(930 <= count <= 975 for count in within.values())


def test_without_enough_groups_or_with_other_groups_nothing_is_claimed():
    few, others = Score.of_samples([0.0, 1.0] * 3), Score.of_means([0.0, 1.0] * 5, [2] * 10)
    assert few.stderr is None
    assert few.samples == 6
    assert Score.of_samples([0.0, 1.0] * 5).less(others).stderr is None
    assert jackknife_stderr(np.array([np.nan] * 9), np.ones(9)) is None
    assert Score(0.5).less(0.25) == Difference(0.25, None)
    assert not Difference(0.25, None).within_noise


def test_a_score_is_a_number_that_can_be_copied_and_sent():
    score = Score.of_samples(range(10))
    for again in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
        assert again == score == 4.5
        assert again.stderr == score.stderr


def test_per_sample_values_of_any_kind_become_scores():
    values = [True, False, True, True] * 3
    for kind in (list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x).half().requires_grad_()):
        assert as_scores({"acc": kind(values)})["acc"].samples == 12
    assert as_scores({"acc": torch.tensor(0.5), "f1": np.float32(0.5), "n": 3}) == {"acc": 0.5, "f1": 0.5, "n": 3.0}


def test_the_log_ratio_tells_errors_apart_where_a_mean_of_them_cannot():
    rng = np.random.default_rng(3)
    base = np.exp(2 * rng.normal(size=64))
    a, b = 1.1 * base * np.exp(0.1 * rng.normal(size=64)), base
    ratio = log_ratio(a, b)
    assert ratio.mean == pytest.approx(np.log(1.1), abs=3 * ratio.stderr)
    assert ratio.stderr == pytest.approx(0.1 / 8, rel=0.3)
    assert not ratio.within_noise
    assert Score.of_samples(a).stderr > abs(a.mean() - b.mean())
    assert log_ratio([0.0, 1.0], [1.0, 0.0]) is None
    assert log_ratio([1.0], [1.0, 2.0]) is None
