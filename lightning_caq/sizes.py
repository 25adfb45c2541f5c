"""Sizes: the bits of a layer, and what layers take to store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Width = int | tuple[int, ...]
"""One bit-width for all weights of a layer, or one for each of its output channels."""

W = TypeVar("W", bound=Width)

WIDTH_BITS = 3  # a width of 1 to 8 bits less one
TERM_BITS = 2  # of a term of a series
PER_LAYER = ("codebook", "dorefa")  # one basis a layer; the others have one a channel
STEPPED = "stepped"  # one step a layer
CODEBOOKS = ("codebook", "lq_nets", "abc_net", "series", "dorefa")
GIGA = 10**9
ZERO_POINT_BITS = 16
SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
FLOAT_BITS = 32


def average_bits(width: Width | float) -> int | float:
    """Bits a weight on average; every channel has as many weights.

    Example:
        >>> average_bits(3), average_bits((2, 2, 4, 2))
        (3, 2.5)
    """
    return sum(width) / len(width) if isinstance(width, tuple) else width


def code_bytes(width: Width | float, weights: int) -> int:
    """Bytes of a layer's codes: channels of one width lie together, and each width begins with a new byte.

    Args:
        width: The layer's bits; an average where its codes are entropy-coded.
        weights: Number of its weights.

    Example:
        >>> code_bytes(3, 9), code_bytes((2, 4, 2), 9)
        (4, 4)
    """
    if isinstance(width, float):
        return round(weights * width / 8)
    if isinstance(width, int):
        return -(-weights * width // 8)
    channel_weights = weights // len(width)
    return sum(-(-width.count(b) * channel_weights * b // 8) for b in set(width))


def width_bits(width: Width) -> int:
    """Bits that say which channel has which width, whole bytes; nothing where all have the same.

    Example:
        >>> width_bits(3), width_bits((2, 4, 2))
        (0, 16)
    """
    return 0 if isinstance(width, int) else -(-len(width) * WIDTH_BITS // 8) * 8


def overhead_bits(channels: int, scale_bits: int = FLOAT_BITS) -> int:
    """Bits of the scales and zero points of one layer, one pair an output channel (theory: sizes and ratios).

    Example:
        >>> overhead_bits(10)
        480
    """
    return channels * (scale_bits + ZERO_POINT_BITS)


def zero_point_bits(groups: int, bits: int) -> int:
    """Bits of the zero points of groups, multiples of one half within the codes, in whole bytes.

    Args:
        groups: Groups of all channels.
        bits: Bit-width of the codes.

    Example:
        >>> zero_point_bits(10, 2)
        32
    """
    return -(-groups * (bits + 1) // 8) * 8


@dataclass(frozen=True)
class LayerSizes:
    """What a budget needs to know of the layers, in their order.

    Attributes:
        weights: Number of weights of each layer, n_i.
        channels: Number of output channels of each layer; each has one scale and one zero point.
        unquantized: Weights that stay in float32: all other parameters with two or more dimensions, those of excluded
            layers among them. Biases and the scales of norms count as no weights.
        macs: Multiply–accumulates of each layer for one sample, m_i; empty where they are not known.
        activation_bits: Bits of each layer's input, b_a,i; empty where inputs stay in float32.
        widths: Bits that say which channel has which bit-width, where channels of a layer differ.
        quantizer: What weights are rounded to: evenly spaced values, or those of a table.
        memory: Bits that all weights took in memory before; 0 where that was in float32.
        unquantized_memory: Bits of those that stay in floating point; 0 where they are in float32.
        groups: Groups of each channel that have a scale of their own, by layer, 0 where a channel has one; empty where
            no layer has groups.
        scale_bits: Bits of a scale.
    """

    weights: tuple[int, ...]
    channels: tuple[int, ...]
    unquantized: int = 0
    macs: tuple[int, ...] = ()
    activation_bits: tuple[int, ...] = ()
    widths: int = 0
    quantizer: str = "affine"
    memory: int = 0
    unquantized_memory: int = 0
    groups: tuple[int, ...] = ()
    scale_bits: int = FLOAT_BITS

    @property
    def overhead(self) -> int:
        """Bits of what takes as much at every bit-width: scales, zero points and widths of channels, scales of groups.

        Quantizers with tables have none.

        Example:
            >>> LayerSizes((128,), (1,), groups=(2,), scale_bits=16).overhead
            32
        """
        if self.quantizer != "affine":
            return 0
        groups = self.groups or (0,) * len(self.channels)
        return self.widths + sum(
            g * c * self.scale_bits if g else overhead_bits(c, self.scale_bits)
            for g, c in zip(groups, self.channels, strict=True)
        )

    def tables(self, bits: Sequence[float]) -> int:
        """Bits of what takes more at more bits: the numbers that tables are made of, and zero points of groups.

        Example:
            >>> LayerSizes((100, 300), (10, 20), quantizer="lq_nets").tables([2, 3]) == 32 * (10 * 2 + 20 * 3)
            True
            >>> LayerSizes((128,), (8,), groups=(1,)).tables([2])
            24
        """
        return sum(self.table(index, b) for index, b in enumerate(bits))

    def table(self, index: int, bits: float) -> int:
        """The same for one layer."""
        channels = self.channels[index]
        if self.quantizer != "affine":
            return FLOAT_BITS * stored_numbers(self.quantizer, int(bits), channels)
        groups = self.groups[index] if self.groups else 0
        return zero_point_bits(groups * channels, int(bits)) if groups else 0

    @property
    def input_bits(self) -> tuple[int, ...]:
        """Bits of each layer's input, 32 for float32."""
        return self.activation_bits or (FLOAT_BITS,) * len(self.weights)

    def payload(self, bits: Sequence[float]) -> int:
        """Bits of the weights alone, Σ n_i b_i; whole, where b_i are averages over channels too."""
        return sum(round(n * b) for n, b in zip(self.weights, bits, strict=True))

    def avg_bits(self, bits: Sequence[float]) -> float:
        """Average bits of a quantized weight, Σ n_i b_i / Σ n_i; scales are not counted.

        Example:
            >>> LayerSizes(weights=(100, 300), channels=(10, 10)).avg_bits([8, 4])
            5.0
        """
        return self.payload(bits) / sum(self.weights)

    def ratio(self, bits: Sequence[float]) -> float:
        """Float32 size over quantized size of all weights; scales, zero points, tables and excluded layers count."""
        left = FLOAT_BITS * self.unquantized
        return (FLOAT_BITS * sum(self.weights) + left) / (self.payload(bits) + self.overhead + self.tables(bits) + left)

    @property
    def unquantized_bits(self) -> int:
        """Bits of the weights that stay in floating point, in their own type."""
        return self.unquantized_memory or FLOAT_BITS * self.unquantized

    def memory_ratio(self, bits: Sequence[float]) -> float | None:
        """Size in memory before over quantized size; ``None`` where the weights were in float32.

        Example:
            >>> sizes = LayerSizes((1000,), (2,), memory=16 * 1000)
            >>> sizes.ratio([4]) == 2 * sizes.memory_ratio([4])
            True
        """
        if not self.memory:
            return None
        return self.memory / (self.payload(bits) + self.overhead + self.tables(bits) + self.unquantized_bits)

    def bops(self, bits: Sequence[int]) -> float:
        """Bit operations of one sample in the quantized layers, Σ m_i b_i b_a,i, in billions.

        Example:
            >>> LayerSizes((100,), (10,), macs=(10**9,), activation_bits=(8,)).bops([4])
            32.0
        """
        return sum(m * b * a for m, b, a in zip(self.macs, bits, self.input_bits, strict=True)) / GIGA


def term_bits(bits: int) -> tuple[int, ...]:
    """Bits of the terms of a series that takes ``bits`` bits a weight in all.

    Example:
        >>> term_bits(5)
        (2, 2, 1)
    """
    return (TERM_BITS,) * (bits // TERM_BITS) + (1,) * (bits % TERM_BITS)


def stored_numbers(quantizer: str, bits: int, channels: int) -> int:
    """Float32 numbers that the basis of one layer takes.

    Args:
        quantizer: A name of ``CODEBOOKS``.
        bits: Bit-width of the layer.
        channels: Its output channels.

    Example:
        >>> stored_numbers("lq_nets", 3, channels=16), stored_numbers("codebook", 3, channels=16)
        (48, 8)
    """
    if quantizer == STEPPED:
        return 1
    if quantizer == "codebook":
        numbers = 1 << bits
    elif quantizer == "dorefa":
        numbers = 1
    else:
        numbers = len(term_bits(bits)) if quantizer == "series" else bits
    return numbers * (1 if quantizer in PER_LAYER else channels)
