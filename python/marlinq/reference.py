"""An independent reference in plain numpy and float64, straight from the definition of the format.

It shares no code with the core. `marlinq verify`, `marlinq bench` and the tests compare with it:

    y[m, n] = sum_k x[m, k] * (q[k, n] - zero[g(k), n]) * scale[g(k), n] + bias[n]
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BOUNDS = {
    "float32": 2e-6,
    "int16": 5e-5,
    "bfloat16": 4e-3,
    "int8": 1.5e-2,
    "float16": 4e-4,
}
"""Largest relative error of a product on standard normal x, by the name of the arithmetic."""

FEW_ELEMENTS = 256
"""Outputs smaller than this are measured against `Product.magnitude`, with three times the
bound."""

_BLOCK = 256  # columns at a time: the unpacked block of a wide layer stays in tens of megabytes


def unpack(words: Array, bits: int, count: int) -> Array:
    """Unpacks codes along the first axis, a continuous little-endian bit stream of 32-bit words.

    Args:
        words: int32 or uint32 `[ceil(count * bits / 32), N]`.
        bits: Of a code, 1 to 8.
        count: How many codes a column holds.

    Returns:
        uint8 `[count, N]`.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    positions = np.arange(count) * bits
    first, offset = positions // 32, (positions % 32).astype(np.uint32)[:, None]
    codes = words[first] >> offset
    if 32 % bits:  # a code may end in the next word
        after = words[np.minimum(first + 1, len(words) - 1)].astype(np.uint64)
        codes = codes | (after << (32 - offset.astype(np.uint64))).astype(np.uint32)
    return (codes & np.uint32((1 << bits) - 1)).astype(np.uint8)


def decode_zeros(qzeros: Array, bits: int, n: int, zero_points: str) -> Array:
    """Decodes zero points.

    Args:
        qzeros: int32 or uint32 `[G, ceil(n * bits / 32)]`, packed along its last axis.
        bits: Of a zero point.
        n: Output features.
        zero_points: "v1" (stored minus 1) or "v2".

    Returns:
        uint8 `[G, n]`, values 0 to 2^bits - 1.
    """
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    if zero_points == "v2":
        return unpack(words.T, bits, n).T
    if 32 % bits:
        return (unpack(words.T, bits, n).T + np.uint8(1)) & np.uint8((1 << bits) - 1)
    # The writer subtracted a 1 in every field from the whole word, with borrow: add it back the
    # same way.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return unpack((words + np.uint32(ones)).T, bits, n).T


def find_convention(
    qzeros: Array | None, bits: int, n: int, *, labelled: str = "auto", symmetry: str = "unknown"
) -> str:
    """Decides how zero points are stored: "v1" or "v2".

    Where every stored code is 2^(bits-1) - 1 it is v1, and where every one is 2^(bits-1) it is v2,
    unless the configuration says "asymmetric"; all else follows the label, "auto" meaning v1.
    """
    if qzeros is not None and symmetry != "asymmetric":
        stored = decode_zeros(qzeros, bits, n, "v2")
        middle = 1 << (bits - 1)
        for code, convention in ((middle - 1, "v1"), (middle, "v2")):
            if np.all(stored == code):
                return convention
    return "v1" if labelled == "auto" else labelled


def widen(values: Array) -> Array:
    """Floating-point values as float64; uint16 is taken for the words of bfloat16."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float64)


@dataclass(frozen=True)
class Product:
    """A product, and what its errors are measured against.

    Attributes:
        y: float64 `[M, N]`.
        magnitude: float64 `[M, N]`, the sum over k of x² w² (bias left out).
    """

    y: Array
    magnitude: Array

    def error(self, result: Array) -> tuple[float, float]:
        """The relative error of a result's first rows, and the factor that its bound gets.

        From 256 elements on it is the relative Frobenius norm, factor 1. Below that it is the norm
        of the difference over sqrt(sum of magnitude), factor 3. Not finite where the result is not.
        """
        rows = len(result)
        difference = float(np.linalg.norm(result.astype(np.float64) - self.y[:rows]))
        if result.size < FEW_ELEMENTS:
            scale, factor = float(np.sqrt(self.magnitude[:rows].sum())), 3.0
        else:
            scale, factor = float(np.linalg.norm(self.y[:rows])), 1.0
        return (difference / scale if scale > 0 else difference), factor


@dataclass(frozen=True)
class Weight:
    """A GPTQ weight as a checkpoint holds it.

    Fields as the arguments of `marlinq.load_gptq`, bfloat16 as its uint16 words. `zero_points` is
    "auto", "v1" or "v2"; `labelled` and `symmetry` are what the configuration claims, as
    `find_convention` takes them.
    """

    qweight: Array
    scales: Array
    qzeros: Array | None = None
    g_idx: Array | None = None
    bias: Array | None = None
    bits: int = 4
    group_size: int = 128
    k: int | None = None
    zero_points: str = "auto"
    labelled: str = "auto"
    symmetry: str = "unknown"

    @property
    def in_features(self) -> int:
        """K."""
        if self.k is not None:
            return self.k
        if self.g_idx is not None:
            return len(self.g_idx)
        return len(self.qweight) * 32 // self.bits

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.scales.shape[1])

    def groups(self) -> Array:
        """The group of each input row, int64 `[K]`."""
        k = self.in_features
        if self.g_idx is None:
            return np.arange(k) // (k if self.group_size == -1 else self.group_size)
        groups = self.g_idx.astype(np.int64)
        return np.where(groups < 0, groups + len(self.scales), groups)

    def zeros(self) -> Array:
        """The zero points, uint8 `[G, N]`."""
        n = self.out_features
        if self.qzeros is None:
            return np.full((len(self.scales), n), 1 << (self.bits - 1), np.uint8)
        convention = self.zero_points
        if convention == "auto":
            convention = find_convention(
                self.qzeros, self.bits, n, labelled=self.labelled, symmetry=self.symmetry
            )
        return decode_zeros(self.qzeros, self.bits, n, convention)

    def _block(self, columns: slice, zeros: Array, groups: Array) -> Array:
        codes = unpack(self.qweight[:, columns], self.bits, self.in_features).astype(np.float64)
        codes -= zeros[:, columns].astype(np.float64)[groups]
        codes *= widen(self.scales[:, columns])[groups]
        return codes

    def dequantize(self, dtype: Any = np.float64) -> Array:
        """The matrix `[N, K]`. With float16 or bfloat16 scales float32 holds it exactly."""
        zeros, groups = self.zeros(), self.groups()
        weight = np.empty((self.out_features, self.in_features), dtype)
        for start in range(0, self.out_features, _BLOCK):
            columns = slice(start, start + _BLOCK)
            weight[columns] = self._block(columns, zeros, groups).T
        return weight

    def product(self, x: Array) -> Product:
        """The product x Wᵀ + bias in float64, a block of columns at a time.

        Args:
            x: `[M, K]`, any floating-point type.
        """
        x = widen(x)
        zeros, groups = self.zeros(), self.groups()
        y = np.empty((len(x), self.out_features))
        magnitude = np.empty_like(y)
        for start in range(0, self.out_features, _BLOCK):
            columns = slice(start, start + _BLOCK)
            weight = self._block(columns, zeros, groups)
            y[:, columns] = x @ weight
            magnitude[:, columns] = np.square(x) @ np.square(weight)
        if self.bias is not None:
            y += widen(self.bias)
        return Product(y, magnitude)
