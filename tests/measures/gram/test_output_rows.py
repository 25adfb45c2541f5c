"""Which rows are computed: unbiased draws, their standard errors, and outputs whose samples lie elsewhere."""

import nets
import pytest
import torch
from every import every
from scipy import stats
from torch import nn

from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import find_layers
from lightning_caq.network.prepare import ModelUse, prepare

SEEDS = 250


class Drawn:
    """A network with more rows than may be taken, and its dense Gauss–Newton matrix."""

    def __init__(self, name, batches, max_rows):
        self.net, self.batches, self.max_rows = getattr(nets, name)().double().eval(), batches, max_rows
        self.layers = find_layers(self.net, batches[0])
        self.dense = nets.Dense(self.net, [x.name for x in self.layers])
        self.matrix = nets.gauss_newton(nets.Case(self.net, batches), self.dense)

    def spectrum(self, seed, deltas=None):
        deltas = deltas or {x.name: {} for x in self.layers}
        with differentiable(self.net, self.layers):
            return gram_spectrum(self.net, self.layers, self.batches, deltas, k=2, max_rows=self.max_rows, seed=seed)


def _drawn(name):
    return {
        "mlp": lambda: Drawn("mlp", list(torch.randn(45, 4, dtype=torch.float64).split(30)), 40),
        "pixels": lambda: Drawn("pixels", [torch.randn(4, 2, 4, 4, dtype=torch.float64)], 60),
        "Words": lambda: Drawn("Words", [torch.randint(0, 6, (6, 5)), torch.randint(0, 6, (2, 4))], 60),
    }[name]()


@every("name", ["mlp", "pixels", "Words"])
def test_traces_and_quadratic_forms_are_unbiased_and_errors_cover(name):
    drawn = _drawn(name)
    deltas = {x.name: {3: torch.randn(x.shape, dtype=torch.float64)} for x in drawn.layers}
    runs = [drawn.spectrum(seed, deltas) for seed in range(SEEDS)]
    assert {run.rows for run in runs} == {drawn.max_rows}
    assert all(run.candidates > run.rows and run.kept == 1 for run in runs)
    least = stats.binom.ppf(1e-4, SEEDS, 0.9)  # near 95 % of the runs; draws are skewed
    for layer, block in zip(drawn.layers, drawn.dense.blocks(drawn.matrix), strict=True):
        exact = float(block.trace())
        traces = torch.tensor([run.traces[layer.name] for run in runs], dtype=torch.float64)
        errors = torch.tensor([run.errors[layer.name] for run in runs], dtype=torch.float64)
        assert abs(float(traces.mean()) - exact) < 4 * float(traces.std()) / SEEDS**0.5
        assert least <= int(((traces - exact).abs() <= 1.96 * errors).sum())
        assert float(errors.mean()) == pytest.approx(float(traces.std()), rel=0.2)
        delta = deltas[layer.name][3].flatten()
        forms = torch.tensor([float(run.projected[layer.name][3].square().sum()) for run in runs])
        assert abs(float(forms.mean()) - float(delta @ block @ delta)) < 4 * float(forms.std()) / SEEDS**0.5


def test_each_row_counts_as_often_as_it_should():
    """Drawn with probability π and multiplied by 1/π: the mean weight of every row is its own."""
    torch.manual_seed(1)
    z = torch.randn(6, 4, dtype=torch.float64) * torch.tensor([[0.1], [1], [3], [5], [2], [0.5]])
    p = z.softmax(1)
    total = torch.zeros(6, 4, dtype=torch.float64)
    for seed in range(1500):
        choice = choose_rows(nn.Identity(), list(z.split(4)), 0.0, 10, seed=seed)
        assert len(choice.rows) == 10
        places = [(4 * row.batch + row.sample, row.cls) for row in choice.rows]
        assert places == sorted(set(places))  # in order, each at most once
        for place, row in zip(places, choice.rows, strict=True):
            total[place] += row.weight / 1500
    share = p * (torch.eye(4)[None] - p[:, None]).square().sum(2)
    chance = (10 * share / share.sum()).clamp(1e-9, 1)
    noise = p / 6 * ((1 / chance - 1) / 1500).sqrt()
    assert bool(((total - p / 6).abs() <= 4.5 * noise + 1e-12).all())


def test_heavy_rows_are_certain():
    """One unsure sample among many sure ones is taken every time, with its own weight."""
    z = torch.zeros(40, 2, dtype=torch.float64)
    z[1:, 0] = 6
    for seed in range(20):
        choice = choose_rows(nn.Identity(), [z], 0.0, 10, seed=seed)
        first = [row for row in choice.rows if row.sample == 0]
        assert [(row.cls, row.probability, row.weight) for row in first] == [(0, 1.0, 0.0125), (1, 1.0, 0.0125)]
        assert all(0 < row.probability < 1 for row in choice.rows if row.sample)
        assert (choice.candidates, choice.sampled, len(choice.rows)) == (80, True, 10)


def test_draws_depend_on_the_seed_only():
    z = torch.randn(20, 5)
    first, again, other = (choose_rows(nn.Identity(), [z], 0.0, 30, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_outputs_without_any_curvature():
    """Outputs that are certain to the last digit leave nothing to measure, and nothing breaks."""
    choice = choose_rows(nn.Identity(), [torch.tensor([[1000.0, 0.0]])], 1e-6, 4)
    assert choice.kept == 1
    assert all(row.weight * (1 - row.weight) == 0 for row in choice.rows)


def test_outputs_without_samples_are_those_of_one_sample():
    class Net(nn.Module):
        def forward(self, x):
            return (x - x.std()).mean(0)

    batches = prepare(Net(), [torch.randn(3, 4, 5), torch.randn(3, 4, 5)], 10)
    choice = choose_rows(Net(), batches, 0.0, 99)
    assert {(row.batch, row.sample) for row in choice.rows} == {(0, 0), (1, 0)}
    assert sum(row.weight for row in choice.rows) == pytest.approx(1)  # of two batches, each with four rows of p


def test_values_have_a_row_for_each_column_and_positions_that_are_masked_have_none():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    class Net(nn.Module):
        def forward(self, x, attention_mask):
            return x

    data = [{"x": torch.randn(2, 3, 2), "attention_mask": mask}]
    batches = prepare(Net(), data, 10, use=ModelUse(output="values"))
    rows = choose_rows(Net(), batches, 0.0, 99).rows
    assert [(row.sample, row.position, row.cls) for row in rows] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
    ]
    assert [row.weight for row in rows] == [0.125] * 4 + [0.25] * 2  # mean over columns, positions and samples
