"""The benchmark of groups with a tiny network, and its GPTQ against numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_gptq_without_correlations_rounds_groups_that_span_their_weights():
    from gptq import gptq_weight

    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    found = gptq_weight(w, torch.eye(40, dtype=torch.float64), 3, 16).numpy()
    for start in (0, 16, 32):
        piece = w[:, start : start + 16].double().numpy()
        low, high = np.minimum(piece.min(1), 0)[:, None], np.maximum(piece.max(1), 0)[:, None]
        scale = ((high - low) / 7).astype(np.float16).astype(np.float64)
        zero = np.rint(-low / scale)
        expected = scale * (np.clip(np.rint(piece / scale + zero), 0, 7) - zero)
        assert np.allclose(found[:, start : start + 16], expected, atol=1e-6)


def test_gptq_is_nearer_than_nearest_where_inputs_are_correlated():
    from gptq import gptq_weight

    draws = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=draws)
    w, h = torch.randn(8, 40, generator=draws), (mix @ mix.T / 40).double()
    errors = [w.double() - gptq_weight(w, x, 3, 16).double() for x in (h, torch.eye(40).double())]
    with_feedback, nearest = (float(((e @ h) * e).sum()) for e in errors)
    assert with_feedback < 0.7 * nearest


def test_the_table_of_a_tiny_network(monkeypatch):
    import characters
    import groups as benchmark

    monkeypatch.setattr(benchmark, "SAMPLES", 16)
    monkeypatch.setattr(characters.CharacterModel.__init__, "__defaults__", (32, 1, 2))  # width, depth, heads
    whole = characters.shipped_text()
    text = characters.Text(whole.train[:64], whole.test[:8], whole.characters)
    model = characters.trained_model(text, steps=5, device="cpu")
    log = characters.log_probabilities(model, text.test, "cpu")
    assert characters.perplexity(log, text.test) == pytest.approx(
        float(
            torch.nn.functional.cross_entropy(model(text.test[:, :-1]).flatten(0, 1), text.test[:, 1:].flatten()).exp()
        ),
        rel=1e-4,
    )
    case = benchmark.Case(model, text, log, "cpu")
    args = benchmark.parser().parse_args(["--bits", "3", "--group-size", "64", "--method", "uniform", "--seeds", "1"])
    rows = list(benchmark.measure(case, args))
    assert [row.method for row in rows] == ["gptq", "uniform", "uniform", "uniform"]
    assert rows[1].bytes <= rows[0].bytes  # at no more bytes
    assert all(row.kl > 0 for row in rows)
    for words in ("as 3 bits, groups of 64", "perplexity", "over float", "torch", "Command: x"):
        assert words in benchmark.as_text(rows, case, args, "x")
