"""Arrays of every library: the same kind out, no copies, and what is refused."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import Array, make_layer, stack_arrays
from marlinq import _core
from marlinq.errors import InvalidArgumentError, OutOfMemoryError, UnsupportedError
from support import normal

try:
    import torch
except ImportError:  # the tests that need it are skipped
    torch = None  # type: ignore[assignment]

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

LAYER = make_layer(96, 320, symmetric=False, act_order=True, bias=True, seed=1)
TORCH_TYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture
def linear() -> marlinq.Linear:
    return marlinq.load_gptq(**LAYER.arrays())


def torch_and_numpy(shape: tuple[int, ...], name: str, seed: int) -> tuple[Any, Array]:
    """The same numbers as a torch tensor and as a numpy array."""
    array = normal(shape, seed, getattr(ml_dtypes if name == "bfloat16" else np, name))
    words = torch.from_numpy(array.view(np.int32 if name == "float32" else np.int16))
    return words.view(getattr(torch, name)), array


def bits_of(tensor: Any) -> Array:
    """A torch tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).numpy()


@needs_torch
@pytest.mark.parametrize("name", TORCH_TYPES)
@pytest.mark.parametrize("shape", [(5, 320), (320,), (2, 3, 320), (0, 320)])
def test_torch_in_torch_out(linear: marlinq.Linear, name: str, shape: tuple[int, ...]) -> None:
    tensor, array = torch_and_numpy(shape, name, seed=1)
    result = linear(tensor)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == tensor.dtype
    assert result.shape == (*shape[:-1], 96)
    assert result.device == tensor.device
    np.testing.assert_array_equal(bits_of(result), linear(array).view(np.uint8))


@needs_torch
@pytest.mark.parametrize("name", TORCH_TYPES)
def test_torch_out(linear: marlinq.Linear, name: str) -> None:
    tensor, array = torch_and_numpy((5, 320), name, seed=2)
    for out_name in {name, "float32"}:
        frame = torch.full((7, 110), 7.0, dtype=getattr(torch, out_name))
        out = frame[1:-1, 3:99]
        address = out.data_ptr()
        assert linear(tensor, out=out) is out
        assert out.data_ptr() == address
        wanted = linear(array, out=np.empty((5, 96), np.float32))
        rounded = torch.from_numpy(wanted).to(out.dtype)
        assert torch.equal(frame[1:-1, 3:99], rounded)
        frame[1:-1, 3:99] = 7
        assert torch.all(frame == 7)


@needs_torch
def test_torch_views(linear: marlinq.Linear) -> None:
    tensor, array = torch_and_numpy((6, 400), "float32", seed=3)
    result = linear(tensor[::2, 40:360])
    np.testing.assert_array_equal(result.numpy(), linear(np.ascontiguousarray(array[::2, 40:360])))
    with pytest.raises(InvalidArgumentError, match="x: stride 6 along the last axis"):
        linear(torch.zeros(320, 6).T)
    with pytest.raises(InvalidArgumentError, match="x: the leading axes"):
        linear(torch.zeros(4, 3, 320).transpose(0, 1))


@needs_torch
def test_torch_refusals(linear: marlinq.Linear) -> None:
    with pytest.raises(InvalidArgumentError, match=r"x: requires grad.*detach\(\)"):
        linear(torch.zeros(3, 320, requires_grad=True))
    with pytest.raises(InvalidArgumentError, match=r"out: .*requires grad"):
        linear(torch.zeros(3, 320), out=torch.zeros(3, 96, requires_grad=True))
    with pytest.raises(InvalidArgumentError, match="x: dtype float64, expected float32"):
        linear(torch.zeros(3, 320, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match="x: dtype int64, expected float32"):
        linear(torch.zeros(3, 320, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match="x: 319 columns, expected 320"):
        linear(torch.zeros(3, 319))
    with pytest.raises((InvalidArgumentError, UnsupportedError), match=r"meta|DLPack"):
        linear(torch.zeros(3, 320, device="meta"))
    assert torch.isfinite(linear(torch.ones(3, 320))).all()


@needs_torch
def test_torch_with_grad_recording_on(linear: marlinq.Linear) -> None:
    x = torch.ones(3, 320, requires_grad=True)
    with torch.enable_grad():
        result = linear(x.detach())
    assert not result.requires_grad


@needs_torch
def test_torch_weights() -> None:
    x = normal((3, 320), seed=4)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in LAYER.arrays().items()}
    loaded = marlinq.load_gptq(**tensors)
    np.testing.assert_array_equal(loaded(x), marlinq.load_gptq(**LAYER.arrays())(x))
    # Values that bfloat16 holds: the same weight with scales of another type.
    layer = make_layer(96, 320, scale_dtype="BF16", seed=2)
    arrays = layer.arrays()
    words = torch.from_numpy(layer.tensors()["scales"].array.view(np.int16).copy())
    from_torch = marlinq.load_gptq(**(arrays | {"scales": words.view(torch.bfloat16)}))
    assert from_torch.describe()["scale_dtype"] == "bfloat16"
    np.testing.assert_array_equal(from_torch(x), marlinq.load_gptq(**arrays)(x))


@needs_torch
def test_torch_through_stack_block_and_routing() -> None:
    gate_up, down = (
        marlinq.load_gptq_stacked(**stack_arrays([make_layer(n, 64)] * 4)) for n in (128, 64)
    )
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    ids, weights = marlinq.route(logits, 2)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    wanted_ids, wanted_weights = marlinq.route(logits.numpy(), 2)
    np.testing.assert_array_equal(ids.numpy(), wanted_ids)
    np.testing.assert_array_equal(weights.numpy(), wanted_weights)

    block = marlinq.MoeBlock(gate_up, down)
    result = block(x, ids, weights)
    assert isinstance(result, torch.Tensor)
    wanted = block(x.numpy(), wanted_ids, wanted_weights)
    np.testing.assert_array_equal(result.numpy(), wanted)
    np.testing.assert_array_equal(block(x, ids.long(), weights).numpy(), wanted)
    added = block(x, ids, weights, shared_output=x, residual=x)
    np.testing.assert_array_equal(
        added.numpy(), block(x.numpy(), wanted_ids, wanted_weights, shared_output=x, residual=x)
    )
    for name in ("x", "topk_weights", "shared_output", "residual"):
        arrays = {"x": x, "topk_ids": ids, "topk_weights": weights, "shared_output": x}
        arrays |= {"residual": x, name: (arrays | {"residual": x})[name].clone().requires_grad_()}
        with pytest.raises(InvalidArgumentError, match=f"{name}: .*requires grad"):
            block(**arrays)

    tokens, experts, count = marlinq.moe_align_block_size(ids, 8, 4)
    assert tokens.dtype == experts.dtype == torch.int32
    fused = gate_up.gemm_phase_fused(x, tokens, experts, count, block_size=8, top_k=2, num_tokens=5)
    assert isinstance(fused, torch.Tensor)
    for counted in (np.int64(count), torch.tensor([count], dtype=torch.int32)):
        again = gate_up.gemm_phase_fused(
            x, tokens, experts, counted, block_size=8, top_k=2, num_tokens=5
        )
        assert torch.equal(again, fused)
    with pytest.raises(InvalidArgumentError, match="num_tokens_past_padded: 36, expected a mult"):
        gate_up.gemm_phase_fused(x, tokens, experts, 36, block_size=8, top_k=2, num_tokens=5)
    with pytest.raises(InvalidArgumentError, match="block_size: 0, expected 8, 16, 32, 48 or 64"):
        gate_up.gemm_phase_fused(x, tokens, experts, 36, block_size=0, top_k=2, num_tokens=5)
    batched = gate_up.gemm_phase_batched(x, [(0, 0, 0, 5)])
    assert isinstance(batched, torch.Tensor)
    np.testing.assert_array_equal(batched.numpy(), gate_up[0](x.numpy()))
    # Rows that no dispatch names are zeros.
    sparse = gate_up.gemm_phase_batched(x, [(1, 2, 3, 1)], out_rows=6)
    assert torch.all(sparse[[0, 1, 2, 4, 5]] == 0)
    np.testing.assert_array_equal(sparse[3].numpy(), gate_up[1](x.numpy()[2]))


class Bare:
    """An object that speaks DLPack and has no library."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.exports = 0

    def __dlpack__(self, **options: Any) -> Any:
        self.exports += 1
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bare_dlpack(linear: marlinq.Linear, dtype: Any) -> None:
    x = normal((5, 320), seed=5, dtype=dtype)
    out = Bare(np.zeros((5, 96), dtype))
    assert linear(Bare(x), out=out) is out
    np.testing.assert_array_equal(out._array, linear(x))
    assert out.exports == 1


def test_bare_dlpack_needs_out(linear: marlinq.Linear) -> None:
    with pytest.raises(InvalidArgumentError, match="Bare: its library has no from_dlpack, so pass"):
        linear(Bare(normal((5, 320), seed=5)))


def test_bare_dlpack_weights() -> None:
    x = normal((5, 320), seed=6)
    wrapped = {name: Bare(array) for name, array in LAYER.arrays().items()}
    np.testing.assert_array_equal(
        marlinq.load_gptq(**wrapped)(x), marlinq.load_gptq(**LAYER.arrays())(x)
    )


def test_bare_dlpack_that_requires_grad(linear: marlinq.Linear) -> None:
    x = Bare(np.zeros((5, 320), np.float32))
    x.requires_grad = True  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError, match=r"x: requires grad.*x\.detach\(\)"):
        linear(x, out=np.empty((5, 96), np.float32))


@pytest.mark.parametrize("views", [np.s_[::2, 40:360], np.s_[2:3, 80:], np.s_[3, :320]])
def test_bare_dlpack_views(linear: marlinq.Linear, views: Any) -> None:
    x = normal((6, 400), seed=7)[views]
    out = np.empty((*x.shape[:-1], 96), np.float32)
    linear(Bare(x), out=Bare(out))
    np.testing.assert_array_equal(out, linear(np.ascontiguousarray(x)))


def test_the_producer_is_let_go(linear: marlinq.Linear) -> None:
    x = normal((5, 320), seed=8)
    out = np.empty((5, 96), np.float32)
    before = sys.getrefcount(x), sys.getrefcount(out)
    for _ in range(10):
        linear(Bare(x), out=Bare(out))
        with pytest.raises(InvalidArgumentError):
            linear(Bare(x), out=Bare(out[:3]))
    assert (sys.getrefcount(x), sys.getrefcount(out)) == before


class _Capsule(Bare):
    def __init__(self, capsule: Any) -> None:
        super().__init__(np.zeros((5, 320), np.float32))
        self._capsule = capsule

    def __dlpack__(self, **_options: Any) -> Any:
        if isinstance(self._capsule, Exception):
            raise self._capsule
        return self._capsule


def _spent_capsule() -> Any:
    capsule = np.zeros((5, 320), np.float32).__dlpack__()
    np.from_dlpack(_Capsule(capsule))
    return capsule


@pytest.mark.parametrize(
    ("capsule", "message"),
    [
        (RuntimeError("the array is gone"), "x: the array is gone"),
        (None, r"x: __dlpack__\(\) did not return"),
        ("capsule", r"x: __dlpack__\(\) did not return"),
        (_spent_capsule(), r"x: __dlpack__\(\) did not return a fresh dltensor"),
    ],
)
def test_refused_producers(linear: marlinq.Linear, capsule: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        linear(_Capsule(capsule), out=np.empty((5, 96), np.float32))


def test_arrays_on_other_devices_are_refused() -> None:
    class Elsewhere(Bare):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (7, 0)

    with pytest.raises(UnsupportedError, match="DLPack device type 7, expected the CPU or CUDA"):
        marlinq.route(Elsewhere(np.zeros((5, 4), np.float32)), 2)


@pytest.mark.parametrize("wrap", ["numpy", "bare", "torch"])
def test_shared_gate_of_any_library(wrap: str) -> None:
    if wrap == "torch" and torch is None:
        pytest.skip("torch is not installed")
    wrappers = {"numpy": np.asarray, "bare": Bare, "torch": getattr(torch, "from_numpy", None)}
    gate_up, down = (
        marlinq.load_gptq_stacked(**stack_arrays([make_layer(n, 64)] * 2)) for n in (128, 64)
    )
    x = normal((5, 64), seed=1)
    routing = np.zeros((5, 1), np.int32), np.zeros((5, 1), np.float32)
    gate = normal((1, 64), seed=2)
    block = marlinq.MoeBlock(
        gate_up, down, shared_expert=lambda x: x, shared_gate=wrappers[wrap](gate)
    )
    wide = x.astype(np.float64)
    share = 1 / (1 + np.exp(-wide @ gate[0].astype(np.float64)))
    # A float32 sigmoid and a product, each rounded.
    np.testing.assert_allclose(block(x, *routing), share[:, None] * wide, rtol=3e-7)


class Immutable:
    """An array of a library whose arrays cannot be written."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.array.flags.writeable = False
        self.shape = array.shape
        self.dtype = array.dtype

    def __array_namespace__(self) -> ModuleType:
        return sys.modules["stand_in_library"]

    def __dlpack__(self, **_options: Any) -> Any:
        copy = self.array.copy()
        return copy.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Another array library: it has from_dlpack, and takes over what it is given."""
    library = ModuleType("stand_in_library")
    library.taken = []  # type: ignore[attr-defined]

    def from_dlpack(buffer: Any) -> Immutable:
        array = np.from_dlpack(buffer)
        library.taken.append(buffer)  # type: ignore[attr-defined]
        return Immutable(array)

    library.from_dlpack = from_dlpack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_library", library)
    return library


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(5, 320), (320,), (2, 3, 320), (0, 320)])
def test_another_library(
    linear: marlinq.Linear, library: ModuleType, dtype: Any, shape: tuple[int, ...]
) -> None:
    x = normal(shape, seed=9, dtype=dtype)
    wanted = linear(x)
    result = linear(Immutable(x))
    assert isinstance(result, Immutable)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.array, wanted)
    # Taken over, not copied: both exports name the same memory.
    (buffer,) = library.taken
    if wanted.size:
        assert np.from_dlpack(buffer).ctypes.data == result.array.ctypes.data


def test_another_library_keeps_its_memory(linear: marlinq.Linear, library: ModuleType) -> None:
    x = normal((5, 320), seed=10)
    wanted = linear(x)
    results = [linear(Immutable(x)) for _ in range(20)]
    library.taken.clear()
    for result in results:
        np.testing.assert_array_equal(result.array, wanted)


@pytest.mark.usefixtures("library")
def test_another_library_through_routing_and_stack() -> None:
    logits = normal((5, 4), seed=11)
    ids, weights = marlinq.route(Immutable(logits), 2)
    assert isinstance(ids, Immutable)
    assert isinstance(weights, Immutable)
    wanted_ids, wanted_weights = marlinq.route(logits, 2)
    np.testing.assert_array_equal(ids.array, wanted_ids)
    np.testing.assert_array_equal(weights.array, wanted_weights)
    stack = marlinq.load_gptq_stacked(**stack_arrays([make_layer(64, 64)] * 4))
    x = normal((5, 64), seed=12)
    tokens, experts, count = marlinq.moe_align_block_size(ids, 8, 4)
    assert isinstance(tokens, Immutable)
    assert isinstance(experts, Immutable)
    sizes = {"block_size": 8, "top_k": 2, "num_tokens": 5}
    fused = stack.gemm_phase_fused(Immutable(x), tokens, experts, count, **sizes)
    wanted = stack.gemm_phase_fused(x, tokens.array, experts.array, count, **sizes)
    np.testing.assert_array_equal(fused.array, wanted)
    result = stack.gemm_phase_batched(Immutable(x), [(0, 0, 0, 5)])
    np.testing.assert_array_equal(result.array, stack[0](x))


@pytest.mark.usefixtures("library")
def test_rows_of_no_dispatch_are_zeros_in_another_library() -> None:
    stack = marlinq.load_gptq_stacked(**stack_arrays([make_layer(64, 64)] * 4))
    x = normal((5, 64), seed=12)
    sparse = stack.gemm_phase_batched(Immutable(x), [(0, 0, 1, 5)])
    assert isinstance(sparse, Immutable)
    assert np.all(sparse.array[0] == 0)
    np.testing.assert_array_equal(sparse.array[1:], stack[0](x))


def test_numpy_subclasses_are_numpy(linear: marlinq.Linear) -> None:
    class Named(np.ndarray):
        pass

    x = normal((5, 320), seed=13)
    result = linear(x.view(Named))
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(np.asarray(result), linear(x))


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "g_idx", "bias"])
def test_big_endian_tensors_are_refused(name: str) -> None:
    arrays = LAYER.arrays()
    arrays[name] = arrays[name].astype(arrays[name].dtype.newbyteorder(">"))
    with pytest.raises(InvalidArgumentError, match=f"{name}: dtype .* in foreign byte order"):
        marlinq.load_gptq(**arrays)


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "g_idx", "bias"])
def test_tensors_that_are_not_contiguous_are_refused(name: str) -> None:
    arrays = LAYER.arrays()
    arrays[name] = np.repeat(arrays[name], 2, axis=-1)[..., ::2]
    with pytest.raises(InvalidArgumentError, match=f"{name}: shape .* is not contiguous"):
        marlinq.load_gptq(**arrays)


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "g_idx", "bias"])
@pytest.mark.parametrize("value", [[[1]], "x", 3, {}])
def test_tensors_that_are_no_arrays_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}: {type(value).__name__}, expected"):
        marlinq.load_gptq(**(LAYER.arrays() | {name: value}))


def test_buffers_and_copies_of_a_context() -> None:
    own = marlinq.Context("cpu", 1)
    assert (own.stream, own.captured) == (0, False)
    buffer = _core.DeviceBuffer(own, [3, 4], "float32")
    assert (buffer.shape, buffer.__dlpack_device__()) == ((3, 4), (1, 0))
    taken = np.from_dlpack(buffer)
    assert not taken.any()
    x = normal((3, 8), seed=14)[:, 2:6]
    own.copy(x, buffer)
    own.synchronise()
    np.testing.assert_array_equal(taken, x)
    back = np.zeros((3, 9), np.float32)
    own.copy(buffer, back[:, 4:8])
    np.testing.assert_array_equal(back[:, 4:8], x)
    assert not back[:, :4].any()
    with pytest.raises(InvalidArgumentError, match="from: 3 rows, expected at least 4"):
        own.copy(buffer, np.zeros((4, 4), np.float32))
    with pytest.raises(InvalidArgumentError, match="from: dtype float32, expected float16"):
        own.copy(buffer, np.zeros((3, 4), np.float16))
    with pytest.raises(InvalidArgumentError, match=r"shape: \[-1\], expected no negative extent"):
        _core.DeviceBuffer(own, [-1], "float32")
    with pytest.raises(InvalidArgumentError, match="dtype: float64, expected float32"):
        _core.DeviceBuffer(own, [1], "float64")
    with pytest.raises(OutOfMemoryError, match="cannot allocate"):
        _core.DeviceBuffer(own, [1 << 31, 1 << 31], "float32")


def test_forwards_are_timed_in_turn(linear: marlinq.Linear) -> None:
    own = marlinq.Context("cpu", 1)
    x, out = normal((5, 320), seed=15), np.zeros((5, 96), np.float32)
    handles = [linear._handle, linear._handle]
    assert _core.time_forwards(own, handles, x, out, first=1, count=3) > 0
    np.testing.assert_array_equal(out, linear(x))
    for layers, first, count in (([], 0, 1), (handles, -1, 1), (handles, 0, 0)):
        with pytest.raises(InvalidArgumentError, match="expected at least 1 handle, first 0 and"):
            _core.time_forwards(own, layers, x, out, first=first, count=count)


def test_arrays_of_jax_are_not_written(linear: marlinq.Linear) -> None:
    """A class of a module of that name stands in: JAX itself runs in the GPU tests."""
    kind = type("ArrayImpl", (Bare,), {"__module__": "jaxlib._jax"})
    with pytest.raises(InvalidArgumentError, match="out: arrays of JAX are immutable"):
        linear(normal((5, 320), seed=16), out=kind(np.zeros((5, 96), np.float32)))
