"""Rows drawn from a stream of outputs against their shares, computed for all of them at once."""

import pytest
import torch
from torch import nn

from lightning_caq.measures.gram import output_rows, row_stream
from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.row_stream import Stretch, draw_from_stream


def test_each_row_counts_as_often_as_it_should(monkeypatch):
    """The mean over draws of (drawn / π) is one for every row, and π is in proportion to the share, but at most 1."""
    monkeypatch.setattr(row_stream, "_CHUNK_NUMBERS", 8)
    torch.manual_seed(1)
    z = torch.randn(6, 4) * torch.tensor([[0.1], [1], [3], [5], [2], [0.5]])
    p = z.softmax(1)
    share = p * (torch.eye(4)[None] - p[:, None]).square().sum(2)
    total, draws = torch.zeros(6, 4), 1500
    ones = torch.ones(6, dtype=torch.float64)
    stretches = [Stretch(z[:4], ones[:4]), Stretch(z[4:], ones[4:])]
    for seed in range(draws):
        drawn = draw_from_stream(lambda: iter(stretches), 10, torch.Generator().manual_seed(seed))
        places = [(4 * row.stretch + row.position, row.column) for row in drawn.rows]
        assert len(set(places)) == 10
        assert drawn.candidates == 24
        for place, row in zip(places, drawn.rows, strict=True):
            assert row.weight == pytest.approx(float(p[place]), rel=1e-5)
            assert row.probability <= 1 + 1e-6
            total[place] += 1 / row.probability / draws
    chance = (10 * share / share.sum()).clamp(1e-9, 1)
    assert bool(((total - 1).abs() <= 4.5 * ((1 / chance - 1) / draws).sqrt() + 1e-4).all())


def test_large_outputs_are_drawn_without_being_held(monkeypatch):
    """The same probabilities as for outputs that are held, and rows in the order of batches."""
    monkeypatch.setattr(output_rows, "_MOST_KEPT", 100)
    z = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))  # samples, positions, classes
    choice = choose_rows(nn.Identity(), [z[:3], z[3:]], 0.0, 12, seed=1)
    places = [(row.batch, row.sample, row.position) for row in choice.rows]
    assert places == sorted(places)
    assert choice.sampled
    p = z.softmax(2)
    share = p * (1 - 2 * p + p.square().sum(2, keepdim=True)) / 15
    for row in choice.rows:
        place = (3 * row.batch + row.sample, row.position, row.cls)
        if row.probability < 1:
            assert row.probability == pytest.approx(12 * float(share[place] / share.sum()), rel=0.2)
        assert row.weight * row.probability == pytest.approx(float(p[place]) / 15, rel=1e-4)
    assert choose_rows(nn.Identity(), [z[:3], z[3:]], 0.0, 12, seed=1) == choice
