from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data"

needs_data = pytest.mark.skipif(not (DATA / "mnist_20k.npz").is_file(), reason=f"the benchmark's data is not in {DATA}")


@needs_data
def test_training_is_kept_and_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import networks
    import small_networks

    monkeypatch.setattr(small_networks, "EPOCHS", 1)
    state = torch.get_rng_state()
    model, train, test = small_networks.load_small("mlp2", DATA, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [file.name for file in tmp_path.iterdir()] == ["mlp2.pt"]
    assert (len(train), len(test), model.training) == (10_000, 10_000, False)
    assert networks.accuracy(model, test) > 85
    monkeypatch.setattr(small_networks, "_train", lambda *_: pytest.fail("trained again"))
    again = small_networks.load_small("mlp2", DATA, tmp_path)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import small_networks

    sizes = {"mlp2": [784, 256, 10], "mlp4": [784, 512, 256, 128, 10]}
    for name, build in small_networks.SMALL.items():
        net = build().eval()
        assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        linear = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
        if name in sizes:
            assert [linear[0].in_features, *(m.out_features for m in linear)] == sizes[name]
