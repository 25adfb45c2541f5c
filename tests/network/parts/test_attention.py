import itertools

import torch
from parts_help import assert_same_by_parts
from torch import Tensor, nn

SAMPLES, QUERIES, KEYS, SIZE, HEADS = 3, 4, 5, 8, 2


def rows(count: int, size: int, *, batch_first: bool) -> Tensor:
    x = torch.randn(SAMPLES, count, size)
    return x if batch_first else x.transpose(0, 1)


def test_attention_by_parts_is_that_of_torch_for_every_way_to_build_it():
    for first, other, extra, zero, bias in itertools.product([False, True], [None, 6], *[[False, True]] * 3):
        net = nn.MultiheadAttention(
            SIZE, HEADS, bias=bias, add_bias_kv=extra, add_zero_attn=zero, kdim=other, vdim=other, batch_first=first
        )
        q, k = rows(QUERIES, SIZE, batch_first=first), rows(KEYS, other or SIZE, batch_first=first)
        assert_same_by_parts(net, q, k, k)


def test_attention_by_parts_is_that_of_torch_for_every_mask_and_output():
    net = nn.MultiheadAttention(SIZE, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    q, k = rows(QUERIES, SIZE, batch_first=True), rows(KEYS, SIZE, batch_first=True)
    padding = torch.zeros(SAMPLES, KEYS, dtype=torch.bool)
    padding[0, 3:] = True
    square, heads = torch.randn(QUERIES, KEYS), torch.randn(SAMPLES * HEADS, QUERIES, KEYS)
    added = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    masks = [(None, padding), (square, None), (square, added), (square > 1, padding), (heads, added), (None, None)]
    for mask, pad in masks:
        for weights, average in ((False, True), (True, True), (True, False)):
            assert_same_by_parts(
                net, q, k, k, key_padding_mask=pad, attn_mask=mask, need_weights=weights, average_attn_weights=average
            )


def test_causal_attention_and_a_sample_without_batch():
    net = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    x = rows(QUERIES, SIZE, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    assert_same_by_parts(net, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    padding = torch.tensor([False, False, False, True])
    assert_same_by_parts(net, x[0], x[0], x[0], key_padding_mask=padding)


def test_a_subclass_keeps_its_forward():
    class Scaled(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x, x, x)[0]

    assert_same_by_parts(Scaled(SIZE, HEADS, batch_first=True), rows(QUERIES, SIZE, batch_first=True))
