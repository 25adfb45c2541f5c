"""What outputs mean: rows, masks, scales and divergences, against formulas of torch.distributions."""

import pytest
import torch
import torch.nn.functional as F

from lightning_caq.network.outputs import Head, Mask, Part, default_heads, divergence, read_outputs

CLASSES = (Head((), "classes"),)


def _kl(p, q):
    categorical = torch.distributions.Categorical
    return torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))


def _read(tensor, head=None, batch=None):
    heads = default_heads(tensor, len(tensor)) if head is None else (head,)
    return read_outputs(heads, tensor, len(tensor), batch)


def test_rows_of_tokens_pixels_and_single_columns():
    logits = torch.arange(24.0)
    (part,) = _read(logits.reshape(2, 4, 3)).parts
    assert (part.kind, part.positions, part.columns) == ("classes", 4, 3)
    pixels = _read(logits.reshape(2, 3, 2, 2))
    (part,) = pixels.parts
    assert (part.positions, part.columns) == (4, 3)
    assert part.rows(pixels.values)[0, 0].tolist() == [0, 4, 8]  # the classes of the first pixel
    (part,) = _read(logits).parts
    assert (part.kind, part.positions, part.columns) == ("values", 1, 1)


def test_classes_along_the_second_axis_of_three():
    z = torch.randn(2, 5, 7)
    outputs = _read(z, Head((), "classes", 0, 1))
    assert torch.equal(outputs.parts[0].rows(outputs.values), z.transpose(1, 2))


def test_divergence_of_classes_and_of_a_single_column():
    p, q = torch.randn(5, 4), torch.randn(5, 4)
    expected = _kl(p.double(), q.double()).mean()
    assert float(divergence(_read(p), _read(q))) == pytest.approx(float(expected), rel=1e-5)
    single = divergence(_read(p[:, :1]), _read(q[:, :1]))
    assert float(single) == pytest.approx(float(F.mse_loss(p[:, :1], q[:, :1])) / 2)
    assert float(divergence(_read(p.half()), _read(p.half() + 0.01 * q.half()))) > 1e-6  # not lost in half precision


def test_divergence_keeps_double_precision():
    p = torch.randn(5, 4, dtype=torch.float64)
    q = p + 1e-7 * torch.randn_like(p)
    centred = (q - p) - (p.softmax(1) * (q - p)).sum(1, keepdim=True)
    expected = 0.5 * (p.softmax(1) * centred.square()).sum(1).mean()  # second order; the third is 1e-7 of it
    assert float(divergence(_read(p), _read(q))) == pytest.approx(float(expected), rel=0.05)


def test_values_count_relative_to_their_own_variance():
    std = torch.tensor([2.0, 100.0])
    head = Head((), "values", 0, 1, mean=torch.tensor([5.0, -3.0]), std=std)
    p, q = torch.randn(6, 2), torch.randn(6, 2)
    expected = 0.5 * ((p - q) / std).square().mean()
    assert float(divergence(_read(p, head), _read(q, head))) == pytest.approx(float(expected), rel=1e-5)


def test_all_tensors_add_up_whatever_their_unit_of_distance():
    heads = (Head((0,), "classes", unit=7.0), Head((1,), "values", unit=0.1, mean=torch.zeros(1), std=torch.ones(1)))
    p, q = ((torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2))
    before, after = (read_outputs(heads, x, 4) for x in (p, q))
    expected = _kl(p[0], q[0]).mean() + 0.5 * F.mse_loss(p[1], q[1])
    assert float(divergence(before, after)) == pytest.approx(float(expected), rel=1e-5)


def test_positions_that_are_masked_count_nowhere():
    """Each sample counts alike, by the mean over its own positions."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    head = Head((), "classes", 0, 2, masks=(Mask(("m",), "nonzero"),))
    p, q = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    loss = divergence(_read(p, head, {"m": mask}), _read(q, head, {"m": mask}))
    each = _kl(p, q)
    assert float(loss) == pytest.approx(float((each[0, :2].mean() + each[1, 0]) / 2), rel=1e-5)
    other = torch.where(mask[..., None] > 0, q, 99.0)
    assert torch.equal(divergence(_read(p, head, {"m": mask}), _read(other, head, {"m": mask})), loss)


def test_a_mask_of_another_shape_and_one_that_leaves_nothing_are_no_masks():
    head = Head((), "classes", 0, 2, masks=(Mask(("m",), "nonzero"),))
    for mask in (torch.ones(2, 5), torch.zeros(2, 3)):
        assert _read(torch.randn(2, 3, 4), head, {"m": mask}).parts[0].weights is None


def test_shares_of_positions_add_up_to_one_a_sample():
    assert Part("classes", 0, 4, 3).shares(2).sum(1).tolist() == [1, 1]
