"""The product itself: rows, strides, types, outputs and contexts."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import Array, make_layer
from marlinq._context import context_for
from marlinq.errors import DeviceError, InvalidArgumentError, UnsupportedError
from support import LINEAR_BOUND, assert_close, normal, usable_kernels

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ROWS = [0, 1, 2, 7, 16, 17, 63, 64, 65, 257]


def load(n: int = 96, k: int = 320, **options: Any) -> marlinq.Linear:
    layer = make_layer(n, k, symmetric=False, act_order=True, bias=True, seed=1)
    return marlinq.load_gptq(**layer.arrays(), **options)


LAYER = make_layer(96, 320, symmetric=False, act_order=True, bias=True, seed=1)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows(m: int, threads: int, kernel: str) -> None:
    x = normal((m, 320), seed=m)
    result = load(kernel=kernel)(x, context=marlinq.Context("cpu", threads))
    assert result.shape == (m, 96)
    assert result.dtype == np.float32
    assert_close(result, LAYER.expected(x), LINEAR_BOUND, f"n 96, k 320, m {m}")


@pytest.mark.parametrize("dtype", TYPES)
def test_input_types(dtype: Any, kernel: str) -> None:
    x = normal((17, 320), seed=2, dtype=dtype)
    linear = load(kernel=kernel)
    wide = linear(x, out=np.empty((17, 96), np.float32))
    assert_close(wide, LAYER.expected(x), LINEAR_BOUND, f"n 96, k 320, m 17, {dtype}")
    result = linear(x)
    assert result.dtype == dtype
    # One rounding at the end, of the same sums.
    np.testing.assert_array_equal(result, wide.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_large_partial_sums_do_not_overflow(dtype: Any, kernel: str) -> None:
    """Partial sums of 8 million, far over float16's largest number, that cancel in the end."""
    layer = make_layer(32, 512, seed=4)
    codes = layer.codes.copy()
    codes[256:] = 16 - np.maximum(codes[:256], 1)
    codes[:256] = np.maximum(codes[:256], 1)
    mirrored = type(layer)(codes, layer.zeros, np.ones((4, 32)), layer.groups, 4, 128)
    linear = marlinq.load_gptq(**mirrored.arrays(), compute="float32", kernel=kernel)
    x = np.full((3, 512), 16384, dtype)
    np.testing.assert_array_equal(linear(x), np.zeros((3, 32), dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_out_is_written_in_place(dtype: Any) -> None:
    linear = load()
    x = normal((5, 320), seed=3, dtype=dtype)
    for out_dtype in {dtype, np.float32}:
        out = np.full((5, 96), 7, out_dtype)
        address = out.ctypes.data
        result = linear(x, out=out)
        assert result is out
        assert out.ctypes.data == address
        np.testing.assert_array_equal(out.astype(dtype), linear(x))


@pytest.mark.parametrize("m", [1, 2, 17, 65])
@pytest.mark.parametrize("n", [1, 15, 17, 31, 33, 96])
@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_outside_the_output_is_written(m: int, n: int, dtype: Any, kernel: str) -> None:
    linear = load(n, 100, kernel=kernel)
    x = normal((m, 100), seed=m, dtype=dtype)
    frame = np.full((m + 2, n + 7), 1234.0, dtype)
    linear(x, out=frame[1:-1, 3 : 3 + n])
    np.testing.assert_array_equal(frame[1:-1, 3 : 3 + n], linear(x))
    outside = np.ones(frame.shape, bool)
    outside[1:-1, 3 : 3 + n] = False
    assert np.all(frame[outside] == dtype(1234.0)), f"m {m}, n {n}"


def test_nothing_outside_the_input_is_read() -> None:
    x = normal((5, 320), seed=6)
    frame = np.full((7, 400), np.nan, np.float32)
    frame[1:-1, 40:360] = x
    for kernel in usable_kernels():
        linear = load(kernel=kernel)
        np.testing.assert_array_equal(linear(frame[1:-1, 40:360]), linear(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[3:4],
        lambda x: np.broadcast_to(x[:1], (1, 320)),
        lambda x: np.asfortranarray(x[:1]),
        lambda x: x.reshape(2, 3, 2, 320)[:, :, :1],
        lambda x: x.reshape(2, 6, 320)[:1],
    ],
)
def test_strided_input(view: Any) -> None:
    x = view(normal((12, 320), seed=7))
    linear = load()
    np.testing.assert_array_equal(linear(x), linear(np.ascontiguousarray(x)))


@pytest.mark.parametrize("shape", [(320,), (1, 320), (2, 3, 320), (2, 1, 3, 320), (0, 4, 320)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    x = normal(shape, seed=8)
    linear = load()
    result = linear(x)
    assert result.shape == (*shape[:-1], 96)
    flat = linear(x.reshape(-1, 320))
    np.testing.assert_array_equal(result.reshape(-1, 96), flat)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 319), np.float32), "x: 319 columns, expected 320"),
        (np.zeros((3, 321), np.float32), "x: 321 columns, expected 320"),
        (np.zeros((), np.float32), "x: 0 dimensions"),
        (np.zeros((3, 320)), "x: dtype float64, expected float32, float16"),
        (np.zeros((3, 320), np.int32), "x: dtype int32, expected float32, float16"),
        (np.zeros((3, 320), np.complex64), "x: dtype complex64"),
        (np.zeros((3, 320), ">f4"), "x: dtype float32 in foreign byte order"),
        (np.zeros((3, 640), np.float32)[:, ::2], "x: stride 2 along the last axis"),
        (np.zeros((320, 3), np.float32).T, "x: stride 3 along the last axis"),
        (np.zeros((3, 320), np.float32)[:, ::-1], "x: stride -1 along the last axis"),
        (np.zeros((3, 320), np.float32)[::-1], "x: row stride -320"),
        (np.zeros((4, 4, 320), np.float32)[:, :3], "x: the leading axes of shape"),
        ([[0.0] * 320], "x: list, expected a numpy array"),
        (None, "x: NoneType, expected a numpy array"),
        ("x", "x: str, expected a numpy array"),
    ],
)
def test_refused_input(x: Any, message: str) -> None:
    linear = load()
    with pytest.raises(InvalidArgumentError) as raised:
        linear(x)
    assert message in str(raised.value)
    if isinstance(x, np.ndarray):
        with pytest.raises(InvalidArgumentError):
            linear(x, out=np.empty((*x.shape[:-1], 96), np.float32))
    assert np.isfinite(linear(normal((2, 320), seed=1))).all()


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((4, 96), np.float32), "out: 4 rows, expected 5"),
        (np.zeros((6, 96), np.float32), "out: 6 rows, expected 5"),
        (np.zeros((5, 95), np.float32), "out: 95 columns, expected 96"),
        (np.zeros((96,), np.float32), "out: 1 rows, expected 5"),
        (
            np.zeros((5, 96), ml_dtypes.bfloat16),
            "out: dtype bfloat16, expected the input's float16",
        ),
        (np.zeros((5, 96)), "out: dtype float64"),
        (np.zeros((5, 96), np.int32), "out: dtype int32, expected the input's float16 or float32"),
        (np.zeros((5, 192), np.float32)[:, ::2], "out: stride 2 along the last axis"),
        (_read_only(np.zeros((5, 96), np.float32)), "out: read-only"),
        ([0.0], "out: list, expected"),
    ],
)
def test_refused_output(out: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        load()(normal((5, 320), seed=1, dtype=np.float16), out=out)
    assert message in str(raised.value)


def test_output_rows_that_overlap_are_refused() -> None:
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(2000, np.float32), (5, 96), (40, 4))
    with pytest.raises(InvalidArgumentError, match="out: row stride 10, expected at least 96"):
        load()(normal((5, 320), seed=1), out=overlapping)


def test_non_finite_input_stays_in_its_row(kernel: str) -> None:
    linear = load(kernel=kernel)
    x = normal((5, 320), seed=9)
    clean = linear(x)
    dirty = x.copy()
    dirty[2, 17], dirty[2, 40] = np.nan, np.inf
    result = linear(dirty)
    assert np.isnan(result[2]).all()
    np.testing.assert_array_equal(np.delete(result, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("m", [1, 5, 64, 257])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_for_any_number_of_threads(m: int, dtype: Any, kernel: str) -> None:
    layer = make_layer(416, 704, symmetric=False, act_order=True, bias=True, seed=m)
    linear = marlinq.load_gptq(**layer.arrays(), kernel=kernel)
    x = normal((m, 704), seed=m, dtype=dtype)
    first = linear(x, context=marlinq.Context("cpu", 1))
    for threads in (1, 2, 3, 7):
        again = linear(x, context=marlinq.Context("cpu", threads))
        np.testing.assert_array_equal(again.view(np.uint8), first.view(np.uint8))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_batch(threads: int, kernel: str) -> None:
    layer = make_layer(416, 704, symmetric=False, act_order=True, bias=True, seed=3)
    linear = marlinq.load_gptq(**layer.arrays(), batch_invariant=True, kernel=kernel)
    own = marlinq.Context("cpu", threads)
    x = normal((257, 704), seed=3)
    batch = linear(x, context=own)
    for start, rows in ((0, 1), (5, 2), (100, 16), (190, 67), (256, 1)):
        part = linear(x[start : start + rows], context=own)
        np.testing.assert_array_equal(part, batch[start : start + rows])


def test_context_is_used(context: marlinq.Context) -> None:
    linear = load()
    x = normal((65, 320), seed=10)
    assert context.scratch_allocations == 0
    first = linear(x, context=context)
    grown = context.scratch_allocations
    assert grown > 0
    for rows in (65, 1, 17, 65):
        np.testing.assert_array_equal(linear(x[:rows], context=context), first[:rows])
        assert context.scratch_allocations == grown, "a size seen before allocated again"


def test_pregrown_scratch_does_not_grow(context: marlinq.Context) -> None:
    layer = make_layer(96, 256)
    linear = marlinq.load_gptq(**layer.arrays())
    context.pregrow_marlin_gather_scratch(65 * 256)
    grown = context.scratch_allocations
    context.pregrow_marlin_gather_scratch(65 * 256)
    context.pregrow_marlin_gather_scratch(1)
    assert context.scratch_allocations == grown
    x = normal((65, 256), seed=10)
    linear(x, context=context)
    grown = context.scratch_allocations
    linear(x, context=context)
    assert context.scratch_allocations == grown
    with pytest.raises(InvalidArgumentError, match="required_elements: -1, expected at least 0"):
        context.pregrow_marlin_gather_scratch(-1)


def test_one_context_per_thread() -> None:
    here = context_for("cpu")
    assert context_for("cpu") is here
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(context_for, "cpu").result()
        assert pool.submit(context_for, "cpu").result() is there
    assert there is not here


def test_context_properties() -> None:
    own = marlinq.Context("cpu", 3)
    assert (own.device, own.backend, own.threads) == ("cpu", "cpu", 3)
    assert marlinq.Context().threads >= 1


def test_refused_contexts() -> None:
    with pytest.raises(InvalidArgumentError, match="device: 'tpu', expected 'cpu', 'cuda'"):
        marlinq.Context("tpu")
    with pytest.raises(InvalidArgumentError, match="threads: -1"):
        marlinq.Context("cpu", -1)
    if not any(device.startswith("cuda") for device in marlinq.info()["devices"]):
        arrays = make_layer(64, 128).arrays()
        with pytest.raises((UnsupportedError, DeviceError), match="cuda"):
            marlinq.load_gptq(**arrays, device="cuda")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_large_inputs_do_not_overflow(kernel: str, dtype: type) -> None:
    """Products of codes reach beyond float32 here; the results, scaled by 1e-3, do not."""
    layer = make_layer(64, 256, symmetric=False, seed=30)
    lin = marlinq.load_gptq(**layer.arrays(), kernel=kernel)
    largest = 3e38 if dtype is np.float32 else 6e4
    x = np.full((3, 256), largest, dtype)
    x[1] = np.where(np.arange(256) % 2, largest, -largest)
    x[2] = 1
    out = np.empty((3, 64), np.float32)
    lin(x, out=out)
    expected = layer.expected(x).y
    fits = np.abs(expected) < np.finfo(np.float32).max
    assert fits.any()
    assert np.isfinite(out[fits]).all()
    alone = lin(x[2:], out=np.empty((1, 64), np.float32))
    np.testing.assert_array_equal(out[2:], alone)
