"""Modules of the kinds that people bring, from calibration batches to a quantized network, without a word of advice."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_caq import QuantizationResult, quantize
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

FEW = {"avg_bits": 4, "calibration_samples": 32, "curvature_samples": 16, "compare": (), "guard": False}


def quantized(net: nn.Module, batches: list[Any], **options: Any) -> QuantizationResult:
    """Quantize, and check that every layer that can be is, and that what is returned changed, though not much."""
    with torch.no_grad():
        before = [leaves(run(net.eval(), batch)) for batch in batches[:1]]
    result = quantize(net, batches, **{**FEW, **options})
    with torch.no_grad():
        after = [leaves(run(net, batch)) for batch in batches[:1]]
    assert quantized_modules(net)
    assert result.plan.avg_bits <= 4
    for floats, rounded in zip(before, after, strict=True):
        for x, y in zip(floats, rounded, strict=True):
            change = float((x - y).norm() / x.norm())
            assert 0 < change < 0.6, f"relative change {change:.3f}"
    assert all(row.trace is None or row.trace > 0 for row in result.profile.layers), result.profile.layers
    return result


def run(net: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return net(**{name: x for name, x in batch.items() if name != "labels"})
    return net(*batch[:-1]) if isinstance(batch, tuple) else net(batch)


def leaves(output: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


class Detector(nn.Module):
    """A one-stage detector: a pyramid of two levels, class scores, boxes and centredness of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.scores, self.boxes, self.centre = nn.Conv2d(8, 5, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1), nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        first = self.stem(images).relu()
        levels = [first, self.down(first).relu()]
        return {
            "cls_logits": [self.scores(x) for x in levels],
            "bbox_regression": [self.boxes(x).exp() for x in levels],
            "centerness": [self.centre(x) for x in levels],
        }


def test_a_detector_with_a_pyramid_of_heads():
    result = quantized(Detector(), [torch.randn(8, 3, 16, 16) for _ in range(4)])
    assert {"scores", "boxes", "centre"} <= set(result.plan.bits)


class UNet(nn.Module):
    """Segmentation with a skip connection and a transposed convolution; classes on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner, self.up = (
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ConvTranspose2d(16, 8, 2, 2),
        )
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        return self.head(torch.cat([skip, self.up(self.inner(skip).relu())], 1))


def test_a_unet_is_read_as_classes_at_every_pixel():
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8, 8, 8))) for _ in range(4)]
    result = quantized(UNet(), batches, loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert any("class" in note for note in result.report.notes), result.report.notes


def test_a_unet_that_asks_for_the_size_of_its_skip():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
            self.up, self.leave = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            skip = F.relu(self.enter(images))
            deep = F.relu(self.middle(F.max_pool2d(skip, 2)))
            return self.leave(torch.cat([skip, self.up(deep, output_size=skip.shape[-2:])], 1))

    for size in (8, 9):
        quantized(Asking(), [torch.randn(8, 3, size, size) for _ in range(4)])


def test_the_head_of_torchvisions_ssdlite():
    ssdlite = pytest.importorskip("torchvision.models.detection.ssdlite")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
            self.head = ssdlite.SSDLiteHead([8, 8], [2, 2], 3, nn.BatchNorm2d)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            low = F.relu6(self.stem(images))
            return self.head([low, F.relu6(self.down(low))])

    quantized(Net(), [torch.randn(8, 3, 12, 12) for _ in range(4)])


def test_an_autoencoder_is_read_as_values():
    net = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 12))
    result = quantized(net, [torch.randn(16, 12) for _ in range(4)], loss_fn=lambda m, x: F.mse_loss(m(x), x))
    assert any("value" in note for note in result.report.notes), result.report.notes


class TwoTowers(nn.Module):
    """Image and text towers, and the similarity of every pair of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(10, 8), nn.EmbeddingBag(20, 8)
        self.project = nn.Linear(8, 8)

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        a, b = F.normalize(self.image(image), dim=1), F.normalize(self.project(self.text(words)), dim=1)
        return 5 * a @ b.T


def test_a_contrastive_model_whose_outputs_are_pairs():
    batches = [{"image": torch.randn(8, 10), "words": torch.randint(0, 20, (8, 5))} for _ in range(4)]
    result = quantized(TwoTowers(), batches)
    assert {"image", "project"} <= set(result.plan.bits)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.first(x)
        h = (h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])).relu()
        pooled = h.new_zeros(int(batch.max()) + 1, h.shape[1]).index_add(0, batch, h)
        return self.last(pooled)


def test_a_graph_network_that_pools_its_nodes():
    batches = [
        {"x": torch.randn(12, 6), "edge_index": torch.randint(0, 12, (2, 30)), "batch": torch.arange(12) // 4}
        for _ in range(16)
    ]
    quantized(Graph(), batches, calibration_samples=180)  # nodes count as samples while batches are collected


class Packed(nn.Module):
    """A recurrent network over sequences of different lengths, packed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(30, 8), nn.GRU(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words.shape[1])
        return self.head(hidden[torch.arange(len(words)), lengths - 1])


def test_a_recurrent_network_with_packed_sequences():
    batches = [(torch.randint(0, 30, (8, 7)), torch.randint(2, 8, (8,)), torch.zeros(8).long()) for _ in range(4)]
    result = quantized(Packed(), batches)
    assert {"words", "head"} <= set(result.plan.bits)


def test_a_resnet_of_timm_with_checkpointing():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, channels=(4, 4, 4, 4))
    nets.shake_batchnorm(net)  # they start with blocks that do nothing
    net.set_grad_checkpointing(True)
    result = quantized(net, [torch.randn(16, 3, 32, 32) for _ in range(4)], calibration_samples=64)
    assert "layer1.0.conv1" in result.plan.bits
    assert net.grad_checkpointing  # put back as it was


def test_a_transformer_of_hugging_face_in_a_lightning_module():
    transformers = pytest.importorskip("transformers")
    import lightning

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip

    class Glue(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertForSequenceClassification(config)

        def forward(self, **inputs: Tensor) -> Any:
            return self.model(**inputs)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(**batch).loss

    mask = (torch.arange(9) < torch.tensor([9, 5, 7, 4, 9, 3, 8, 6])[:, None]).long()
    batches = [
        transformers.BatchEncoding(
            {"input_ids": torch.randint(0, 40, (8, 9)), "attention_mask": mask, "labels": torch.randint(0, 3, (8,))}
        )
        for _ in range(4)
    ]
    net = Glue().eval()
    with torch.no_grad():
        before = net(**batches[0]).logits
    result = quantize(net, batches, **FEW)
    with torch.no_grad():
        change = float((net(**batches[0]).logits - before).norm() / before.norm())
    assert 0 < change < 0.5
    assert sum("attention" in name for name in result.plan.bits) == 4


def test_a_backbone_that_runs_in_inference_mode_is_measured_and_quantized():
    class Transfer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                features = self.backbone(x)
            return self.head(features.clone())

    net = Transfer()
    result = quantized(net, [torch.randn(16, 8) for _ in range(4)])
    assert set(result.plan.bits) == {"backbone.0", "backbone.2", "head"}
    with torch.no_grad(), torch.inference_mode(False):
        assert net.backbone(torch.randn(2, 8)).is_inference() is False  # nothing of torch is left replaced


def test_experts_that_only_a_later_batch_reaches():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.high if float(x.sum()) > 0 else self.low)(x).relu())

    batches = [-torch.rand(16, 4), *(torch.rand(16, 4) for _ in range(3))]
    assert set(quantized(Experts(), batches, curvature_samples=64, calibration_samples=64).plan.bits) == {
        "low",
        "high",
        "last",
    }
