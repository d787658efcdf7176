"""Arrays of every library into the CUDA backend: in place, on the caller's stream, or copied."""

from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from cuda_support import (
    DEVICE,
    TYPES,
    check_refused_in_capture,
    host,
    load,
    needs_device,
    normal,
    run_with_jax,
    torch,
)
from gptq_writer import make_layer
from marlinq import _core
from marlinq._context import context_for
from marlinq.errors import DeviceError, InvalidArgumentError, UnsupportedError

pytestmark = needs_device

LAYER = make_layer(96, 320, symmetric=False, act_order=True, bias=True, seed=20)


@pytest.fixture(scope="module")
def linear() -> marlinq.Linear:
    return load(LAYER)


# --- torch ---


@pytest.mark.parametrize("dtype", [*TYPES, "float32"])
def test_torch(linear: marlinq.Linear, dtype: str) -> None:
    x = normal(6, 320, dtype)
    y = linear(x)
    assert isinstance(y, torch.Tensor)
    assert (y.dtype, y.device, y.shape) == (x.dtype, x.device, (6, 96))
    out = torch.empty((6, 96), dtype=x.dtype, device=DEVICE)
    address = out.data_ptr()
    assert linear(x, out=out) is out
    assert out.data_ptr() == address
    assert torch.equal(out, y)
    with pytest.raises(InvalidArgumentError, match=r"x: requires grad.*x\.detach\(\)"):
        linear(x.clone().requires_grad_())
    with pytest.raises(InvalidArgumentError, match=r"out: .*requires grad"):
        linear(x, out=out.clone().requires_grad_())
    assert torch.equal(linear(x.clone().requires_grad_().detach()), y)


def test_torch_subclasses(linear: marlinq.Linear) -> None:
    """A class of the user's own is a tensor of torch, and runs on torch's current stream."""

    class Named(torch.Tensor):
        pass

    x = normal(6, 320, "float16")
    named = x.as_subclass(Named)
    parameter = torch.nn.Parameter(x, requires_grad=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for array in (named, parameter):
            assert context_for(DEVICE, like=array).stream == stream.cuda_stream
    assert torch.equal(linear(named), linear(x))
    assert torch.equal(linear(parameter), linear(x))


def test_names_of_devices() -> None:
    x = normal(3, 320, "float16")
    wanted = load(LAYER)(x)
    for name in ("cuda", "cuda:0"):
        linear = load(LAYER, device=name)
        assert linear.device == "cuda:0"
        assert torch.equal(linear(x), wanted)
    assert marlinq.Context("cuda").device == "cuda:0"
    with pytest.raises(DeviceError, match="cuda:99"):
        load(LAYER, device="cuda:99")
    with pytest.raises(InvalidArgumentError, match="device: 'cuda:x', expected 'cpu', 'cuda'"):
        load(LAYER, device="cuda:x")


def test_refusals(linear: marlinq.Linear) -> None:
    x = normal(1, 320, "float16")
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0"):
        linear(x.cpu())
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0"):
        linear(x.cpu(), out=torch.zeros((1, 96), dtype=torch.float16, device=DEVICE))
    with pytest.raises(InvalidArgumentError, match="out: on cpu, expected cuda:0"):
        linear(x, out=torch.zeros((1, 96), dtype=torch.float16))
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0 or a numpy array"):
        linear(x.cpu(), out=np.zeros((1, 96), np.float16))
    with pytest.raises(InvalidArgumentError, match="out: dtype bfloat16, expected the input's"):
        linear(x, out=torch.empty((1, 96), dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(InvalidArgumentError, match="x: dtype int64, expected float32"):
        linear(torch.zeros((1, 320), dtype=torch.int64, device=DEVICE))
    with pytest.raises(InvalidArgumentError, match="x: 319 columns, expected 320"):
        linear(normal(1, 319, "float16"))
    with pytest.raises(InvalidArgumentError, match="x: stride 6 along the last axis"):
        linear(normal(320, 6, "float16").T)
    with pytest.raises(InvalidArgumentError, match="out: 2 rows, expected 1"):
        linear(x, out=torch.empty((2, 96), dtype=torch.float16, device=DEVICE))
    with pytest.raises(InvalidArgumentError, match="context: of backend 'cpu'"):
        linear(x, context=marlinq.Context("cpu"))
    with pytest.raises(InvalidArgumentError, match="x: on cuda:0, expected cpu"):
        load(LAYER, device="cpu")(x)
    with pytest.raises(UnsupportedError, match="compute 'int16'"):
        load(LAYER, compute="int16")
    with pytest.raises(InvalidArgumentError, match=r"kernel: 'sm1', expected one of .*sm80"):
        load(LAYER, kernel="sm1")
    arrays = {name: torch.from_numpy(array).to(DEVICE) for name, array in LAYER.arrays().items()}
    with pytest.raises(InvalidArgumentError, match="qweight: on cuda:0, expected host memory"):
        marlinq.load_gptq(**arrays, device=DEVICE)
    assert torch.isfinite(linear(x)).all()


# --- numpy ---


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_numpy_is_copied_both_ways(linear: marlinq.Linear, dtype: Any) -> None:
    wide = normal(70, 320, "float32")
    x = host(wide).astype(dtype)
    tensor = wide.to(getattr(torch, np.dtype(dtype).name))
    for m in (1, 16, 70, 0):
        y = linear(x[:m])
        assert isinstance(y, np.ndarray)
        assert (y.dtype, y.shape) == (np.dtype(dtype), (m, 96))
        np.testing.assert_array_equal(y.astype(np.float32), host(linear(tensor[:m])))
    assert linear(x[0]).shape == (96,)
    np.testing.assert_array_equal(linear(x.reshape(2, 35, 320)), linear(x).reshape(2, 35, 96))
    # Rows of a larger array, and an output inside one.
    frame = np.zeros((140, 330), dtype)
    frame[::2, 5:325] = x
    store = np.full((72, 110), 7, dtype)
    out = store[1:-1, 3:99]
    assert linear(frame[::2, 5:325], out=out) is out
    np.testing.assert_array_equal(out, linear(x))
    out[...] = 7
    assert (store == 7).all()
    exact = np.empty((70, 96), np.float32)
    linear(x, out=exact)
    np.testing.assert_array_equal(exact.astype(dtype), linear(x))


def test_numpy_beside_torch(linear: marlinq.Linear) -> None:
    x = normal(6, 320, "float16")
    wanted = linear(x)
    out = torch.empty_like(wanted)
    assert linear(x.cpu().numpy(), out=out) is out
    assert torch.equal(out, wanted)
    back = np.empty((6, 96), np.float16)
    assert linear(x, out=back) is back
    np.testing.assert_array_equal(back, wanted.cpu().numpy())
    # On the stream of the tensor, behind the work that makes it.
    new = normal(6, 320, "float16", seed=1)
    expected = linear(new).cpu().numpy()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.copy_(new)
        linear(x, out=back)
    np.testing.assert_array_equal(back, expected)


def test_numpy_of_a_repeated_size_allocates_nothing(linear: marlinq.Linear) -> None:
    context = marlinq.Context(DEVICE)
    x = host(normal(40, 320, "float32"))
    linear(x, context=context)
    grown = context.scratch_allocations
    for m in (40, 1, 17, 0, 40):
        linear(x[:m], context=context)
    assert context.scratch_allocations == grown


def test_numpy_refusals(linear: marlinq.Linear) -> None:
    x = np.zeros((3, 320), np.float32)
    with pytest.raises(InvalidArgumentError, match="x: dtype float64"):
        linear(x.astype(np.float64))
    with pytest.raises(InvalidArgumentError, match="x: 319 columns, expected 320"):
        linear(x[:, 1:])
    with pytest.raises(InvalidArgumentError, match="out: 2 rows, expected 3"):
        linear(x, out=np.zeros((2, 96), np.float32))
    with pytest.raises(InvalidArgumentError, match="out: dtype float16, expected the input's"):
        linear(x, out=np.zeros((3, 96), np.float16))
    frozen = np.zeros((3, 96), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="out: read-only"):
        linear(x, out=frozen)


@pytest.mark.parametrize("side", ["both", "out"])
@pytest.mark.parametrize("own", [False, True])
def test_numpy_cannot_be_captured(linear: marlinq.Linear, side: str, own: bool) -> None:
    x = normal(4, 320, "float16")
    out = torch.empty_like(linear(x))
    stream = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=stream.cuda_stream) if own else None
    array = x.cpu().numpy() if side == "both" else x
    back = np.zeros((4, 96), np.float16)
    check_refused_in_capture(
        lambda: linear(x, out=out, context=context),
        lambda: linear(array, out=back, context=context),
        out,
        stream,
    )
    assert torch.equal(out, linear(x))
    assert not back.any()


def test_copies_and_buffers() -> None:
    """What bench and other libraries' outputs are made of."""
    context = marlinq.Context(DEVICE)
    x = normal(5, 64, "float32")
    buffer = _core.DeviceBuffer(context, [5, 64], "float32")
    assert buffer.shape == (5, 64)
    assert buffer.__dlpack_device__() == (2, 0)
    taken = torch.from_dlpack(buffer)
    assert taken.device == torch.device(DEVICE)
    assert not taken.any()
    context.copy(host(x), buffer)
    context.synchronise()
    assert torch.equal(taken, x)
    back = np.zeros((5, 64), np.float32)
    context.copy(buffer, back)
    np.testing.assert_array_equal(back, host(x))
    del buffer
    assert torch.equal(taken, x)
    with pytest.raises(InvalidArgumentError, match="from: 5 rows, expected at least 6"):
        context.copy(host(x), np.zeros((6, 64), np.float32))


# --- CuPy ---


# What another library has to say at its import is not ours.
uses_cupy = pytest.mark.filterwarnings("ignore")


def cupy_or_skip() -> Any:
    return pytest.importorskip("cupy")


@uses_cupy
def test_cupy(linear: marlinq.Linear) -> None:
    cupy = cupy_or_skip()
    x = normal(6, 320, "float16")
    wanted = linear(x).cpu().numpy()
    array = cupy.asarray(x.cpu().numpy())
    y = linear(array)
    assert isinstance(y, cupy.ndarray)
    assert (y.dtype, y.shape, y.device.id) == (np.float16, (6, 96), 0)
    np.testing.assert_array_equal(cupy.asnumpy(y), wanted)
    out = cupy.zeros((6, 96), cupy.float32)
    assert linear(array, out=out) is out
    np.testing.assert_array_equal(cupy.asnumpy(out).astype(np.float16), wanted)
    store = cupy.zeros((6, 400), cupy.float16)
    store[:, 7:327] = array
    np.testing.assert_array_equal(cupy.asnumpy(linear(store[:, 7:327])), wanted)


@uses_cupy
@pytest.mark.parametrize("kind", ["null", "per thread", "own"])
def test_cupys_current_stream(linear: marlinq.Linear, kind: str) -> None:
    """Its handles of the default streams are 0 and 2."""
    cupy = cupy_or_skip()
    stream = {
        "null": cupy.cuda.Stream.null,
        "per thread": cupy.cuda.Stream.ptds,
        "own": cupy.cuda.Stream(non_blocking=True),
    }[kind]
    old, new = (cupy.asarray(host(normal(6, 320, "float16", seed=s))).astype("f2") for s in (1, 2))
    wanted = cupy.asnumpy(linear(new))
    cupy.cuda.Device().synchronize()
    slow = cupy.RawKernel(
        'extern "C" __global__ void wait(long long n) {'
        " const long long start = clock64(); while (clock64() - start < n) {} }",
        "wait",
    )
    with stream:
        assert context_for(DEVICE, like=old).stream == stream.ptr
        if kind == "per thread":
            assert stream.ptr == 2
        linear(old)
        x = old.copy()
        slow((1,), (1,), (np.int64(100_000_000),))
        x[...] = new
        y = linear(x)
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(y), wanted)


@uses_cupy
def test_host_memory_of_cupy_is_numpys(linear: marlinq.Linear) -> None:
    """Pinned memory comes as a numpy array, and is copied as one."""
    cupyx = pytest.importorskip("cupyx")
    x = cupyx.empty_pinned((6, 320), np.float16)
    x[...] = host(normal(6, 320, "float16"))
    out = cupyx.zeros_pinned((6, 96), np.float16)
    assert linear(x, out=out) is out
    np.testing.assert_array_equal(out, linear(np.array(x)))


# --- another library ---


def test_jax() -> None:
    run_with_jax("""
        from gptq_writer import make_layer
        layer = make_layer(96, 320, symmetric=False, act_order=True, bias=True, seed=20)
        linear = marlinq.load_gptq(**layer.arrays(), device="cuda")
        host = np.random.default_rng(1).standard_normal((6, 320)).astype(np.float16)
        for x in (host, host.astype(np.float32)):
            wanted = linear(x)
            for _ in range(20):
                y = linear(jnp.asarray(x) * 1)
                assert isinstance(y, jax.Array), type(y)
                assert y.dtype == x.dtype and y.shape == (6, 96)
                assert next(iter(y.devices())).platform == "gpu"
                np.testing.assert_array_equal(np.asarray(y + 0), wanted)
        try:
            linear(jnp.asarray(host), out=jnp.zeros((6, 96), jnp.float16))
        except marlinq.errors.InvalidArgumentError as error:
            assert "immutable" in str(error)
        else:
            raise AssertionError("an immutable array was written")
        try:
            linear(jax.device_put(host, jax.devices("cpu")[0]))
        except marlinq.errors.InvalidArgumentError as error:
            assert "x: on cpu, expected cuda:0" in str(error)
        else:
            raise AssertionError("an array in host memory was taken")
    """)


class Bare:
    """An object that speaks DLPack and has no library."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        self.streams: list[Any] = []

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        self.streams.append(stream)
        return self._tensor.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()


def test_arrays_of_no_library_are_waited_for(linear: marlinq.Linear) -> None:
    x = normal(6, 320, "float16")
    wanted = linear(x)
    out = torch.zeros_like(wanted)
    torch.cuda.synchronize()
    bare = Bare(x)
    linear(bare, out=Bare(out))
    assert torch.cuda.default_stream().query(), "the call did not wait"
    assert torch.equal(out, wanted)
    assert bare.streams == [1]  # DLPack's number of the default stream
    own = torch.cuda.Stream()
    bare = Bare(x)
    linear(bare, out=Bare(out), context=marlinq.Context(DEVICE, stream=own.cuda_stream))
    assert bare.streams == [own.cuda_stream]
    own.synchronize()
    assert torch.equal(out, wanted)
    with pytest.raises(InvalidArgumentError, match="Bare: its library has no from_dlpack, so pass"):
        linear(Bare(x))
