"""Writes GPTQ layers and safetensors files for the tests; shares no code with marlinq.

Packing is done bit by bit and every file byte by byte, so that a test can write what no library
would.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

_STORED_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "<u1"}


class Tensor(NamedTuple):
    """A tensor of a file: its safetensors dtype and its elements, bfloat16 as uint16 words."""

    dtype: str
    array: Array

    def numpy(self) -> Array:
        """The elements with the numpy dtype that the loaders take."""
        return self.array.view(ml_dtypes.bfloat16) if self.dtype == "BF16" else self.array


# Smaller than bfloat16 scales that a GPU makes float16: beside one of these all stay as they are.
TINY_SCALE = 2.0**-20


def pack_fields(fields: Array, bits: int) -> Array:
    """Packs along the first axis, as one little-endian bit stream, into int32 words."""
    count, columns = fields.shape
    stream = np.unpackbits(fields[:, None, :].astype(np.uint8), axis=1, bitorder="little")
    stream = stream[:, :bits].reshape(count * bits, columns)
    words = -(-count * bits // 32)
    whole = np.zeros((words * 32, columns), np.uint8)
    whole[: len(stream)] = stream
    packed = np.packbits(whole, axis=0, bitorder="little")
    quads = packed.reshape(words, 4, columns).transpose(0, 2, 1)
    return np.ascontiguousarray(quads).view("<i4").reshape(words, columns)


def pack_zeros(zeros: Array, bits: int, layout: str) -> Array:
    """Packs zero points `[G, N]` along N.

    Args:
        zeros: Values 0 to 2^bits - 1.
        bits: Of a zero point.
        layout: "gptq" (minus 1, today's writers: a zero borrows from the next field), "gptq_v2" and
            "gptq_p" (as they are), "gptq_old" (minus 1, written without a mask: a zero fills the
            rest of its word with ones).
    """
    as_they_are = np.ascontiguousarray(pack_fields(zeros.T, bits).T)
    if layout in ("gptq_v2", "gptq_p"):
        return as_they_are
    if 32 % bits:
        return np.ascontiguousarray(pack_fields(((zeros.astype(int) - 1) % (1 << bits)).T, bits).T)
    if layout == "gptq":
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = as_they_are.astype(np.int64) % (1 << 32) - ones
        return (words % (1 << 32)).astype(np.uint32).view(np.int32)
    assert layout == "gptq_old", layout
    words = np.zeros((len(zeros), -(-zeros.shape[1] * bits // 32)), np.uint64)
    for column in range(zeros.shape[1]):
        word, field = divmod(column, 32 // bits)
        stored = (zeros[:, column].astype(np.int64) - 1) % (1 << 32)
        words[:, word] |= stored.astype(np.uint64) << np.uint64(field * bits)
    return (words % (1 << 32)).astype(np.uint32).view(np.int32)


def round_to(values: Array, dtype: str) -> Array:
    """Rounds to a floating-point type of safetensors; still float64."""
    if dtype == "BF16":
        return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float64)


def floats(values: Array, dtype: str) -> Tensor:
    """A tensor of values that the type holds exactly."""
    if dtype == "BF16":
        return Tensor(dtype, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    return Tensor(dtype, values.astype(_STORED_AS[dtype]))


class Expected(NamedTuple):
    """A product in float64, and the sum over k of x² w² that small outputs are measured against."""

    y: Array
    magnitude: Array


@dataclass(frozen=True)
class Layer:
    """A quantised linear layer before packing.

    Attributes:
        codes: uint8 `[K, N]`.
        zeros: uint8 `[G, N]`.
        scales: float64 `[G, N]`, values that `scale_dtype` holds exactly.
        groups: int64 `[K]`.
        bits: Of a code.
        group_size: -1 for one group.
        bias: float64 `[N]` of values that `bias_dtype` holds exactly, or None.
        scale_dtype: As in safetensors.
        bias_dtype: As in safetensors.
    """

    codes: Array
    zeros: Array
    scales: Array
    groups: Array
    bits: int
    group_size: int
    bias: Array | None = None
    scale_dtype: str = "F16"
    bias_dtype: str = "F16"

    @property
    def k(self) -> int:
        return self.codes.shape[0]

    @property
    def n(self) -> int:
        return self.codes.shape[1]

    def tensors(
        self, layout: str = "gptq", *, qzeros: bool = True, g_idx: bool = True
    ) -> dict[str, Tensor]:
        """The tensors by their last names."""
        tensors = {
            "qweight": Tensor("I32", pack_fields(self.codes, self.bits)),
            "scales": floats(self.scales, self.scale_dtype),
        }
        if qzeros:
            tensors["qzeros"] = Tensor("I32", pack_zeros(self.zeros, self.bits, layout))
        if g_idx:
            tensors["g_idx"] = Tensor("I32", self.groups.astype(np.int32))
        if self.bias is not None:
            tensors["bias"] = floats(self.bias, self.bias_dtype)
        return tensors

    def arrays(self, layout: str = "gptq", **options: bool) -> dict[str, Array]:
        """The tensors as keyword arguments of `marlinq.load_gptq`."""
        return {key: value.numpy() for key, value in self.tensors(layout, **options).items()}

    def dense(self) -> Array:
        """The matrix `[N, K]` in float64."""
        return self._dense

    @cached_property
    def _dense(self) -> Array:
        centred = self.codes.astype(np.float64) - self.zeros.astype(np.float64)[self.groups]
        return (centred * self.scales[self.groups]).T

    def expected(self, x: Array) -> Expected:
        """The product with rows x `[M, K]` of any floating-point type."""
        wide = x.astype(np.float64)
        dense = self.dense()
        y = wide @ dense.T
        if self.bias is not None:
            y = y + self.bias
        return Expected(y, np.square(wide) @ np.square(dense).T)


def make_layer(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    bias: bool = False,
    scale_dtype: str = "F16",
    bias_dtype: str = "F16",
    seed: int = 0,
) -> Layer:
    """A random layer. Asymmetric zero points are 1 and more, which every writer stores alike."""
    random = np.random.default_rng([seed, n, k, bits, group_size % (1 << 32)])
    rows = k if group_size == -1 else group_size
    count = -(-k // rows)
    middle = np.full((count, n), 1 << (bits - 1), np.uint8)
    groups = np.arange(k) // rows
    layer = Layer(
        codes=random.integers(0, 1 << bits, (k, n), np.uint8),
        zeros=middle if symmetric else random.integers(1, 1 << bits, (count, n), np.uint8),
        scales=round_to(random.uniform(0.5, 1.5, (count, n)) / (1 << bits), scale_dtype),
        groups=random.permutation(groups) if act_order else groups,
        bits=bits,
        group_size=group_size,
        bias=round_to(random.standard_normal(n), bias_dtype) if bias else None,
        scale_dtype=scale_dtype,
        bias_dtype=bias_dtype,
    )
    if scale_dtype == "BF16" and n >= 16:
        layer.scales[0, n // 2] = TINY_SCALE
    return layer


def fuse(layers: Sequence[Layer]) -> Array:
    """The matrices of several layers one below the other, `[sum of N, K]`."""
    return np.concatenate([layer.dense() for layer in layers])


def with_zeros(layer: Layer, zeros: Array) -> Layer:
    """The layer with other zero points."""
    return replace(layer, zeros=zeros.astype(np.uint8))


def encode_header(header: Any) -> bytes:
    """A safetensors header, its length included."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def describe_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as a dict, and its data."""
    header: dict[str, Any] = {}
    data = bytearray()
    for name, (dtype, array) in tensors.items():
        stored = np.ascontiguousarray(array).astype(_STORED_AS[dtype], copy=False).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    return header, bytes(data)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a safetensors file and returns its path."""
    header, data = describe_tensors(tensors)
    path.write_bytes(encode_header(header) + data)
    return path


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors under their full names."""
    return {f"{prefix}.{last}": tensor for last, tensor in tensors.items()}


def write_checkpoint(
    directory: Path,
    modules: Mapping[str, Layer | Mapping[str, Tensor]],
    *,
    layout: str = "gptq",
    quantize_config: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
    file: str = "model.safetensors",
) -> Path:
    """Writes a checkpoint of one file and its configurations; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = dict(others or {})
    for name, module in modules.items():
        tensors |= named(name, module.tensors(layout) if isinstance(module, Layer) else module)
    write_safetensors(directory / file, tensors)
    for name, content in (("quantize_config.json", quantize_config), ("config.json", config)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


def stack_arrays(layers: Sequence[Layer], layout: str = "gptq") -> dict[str, list[Array]]:
    """The tensors of several experts as keyword arguments of `marlinq.load_gptq_stacked`."""
    each = [layer.arrays(layout) for layer in layers]
    lists = {name: [arrays[name] for arrays in each] for name in each[0]}
    lists["qweights"] = lists.pop("qweight")
    return lists
