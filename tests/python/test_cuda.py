"""The CUDA backend against float64, on every device of the machine; skipped where there is none."""

import threading
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import Layer, make_layer
from marlinq.errors import DeviceError, InvalidArgumentError, UnsupportedError
from support import assert_close

torch = pytest.importorskip("torch")

DEVICES = [
    device
    for backend in marlinq.info()["backends"]
    if backend["name"] == "cuda"
    for device in backend["devices"]
]
pytestmark = pytest.mark.skipif(not DEVICES, reason="no CUDA device")

# Rounding of the output, and of the activations where a tensor core sums them; the reasons stand in
# tests/tolerances.json.
BOUNDS = {"float16": 4e-4, "bfloat16": 3e-3}
TYPES = ["float16", "bfloat16"]


def load(layer: Layer, device: str = "cuda", **options: Any) -> marlinq.Linear:
    shape = {"bits": layer.bits, "group_size": layer.group_size}
    return marlinq.load_gptq(**layer.arrays(), device=device, **shape, **options)


def normal(m: int, k: int, dtype: str, device: str = "cuda", seed: int = 0) -> Any:
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn((m, k), generator=generator, device=device)
    return x.to(getattr(torch, dtype))


def check(y: Any, x: Any, layer: Layer, what: str) -> None:
    """Against the definition in float64, on the device."""
    dense = torch.from_numpy(layer.dense()).to(x.device)
    wide = x.double()
    expected = wide @ dense.T
    if layer.bias is not None:
        expected += torch.from_numpy(layer.bias).to(x.device)
    difference = torch.linalg.norm(y.double() - expected)
    bound = BOUNDS[str(x.dtype).removeprefix("torch.")]
    if y.numel() >= 256:
        assert difference <= bound * torch.linalg.norm(expected), what
    else:  # few elements: against the size of what was summed
        magnitude = torch.sqrt(torch.sum((wide**2) @ (dense**2).T))
        assert difference <= 3 * bound * magnitude, what


@pytest.mark.parametrize("n", [1, 7, 32, 60, 96, 192, 416, 1408])
@pytest.mark.parametrize("k", [1, 7, 32, 60, 96, 192, 416, 1408, 10944])
def test_shapes(n: int, k: int) -> None:
    layer = make_layer(n, k, symmetric=False, seed=n + k)
    linear = load(layer)
    for m in (0, 1, 7, 16, 17, 63, 64, 65, 257, 1000):
        for dtype in TYPES:
            x = normal(m, k, dtype, seed=m)
            store = torch.full((m + 2, n + 16), 7.0, dtype=x.dtype, device="cuda")
            out = store[1 : m + 1, 8 : n + 8]
            linear(x, out=out)
            if m:
                check(out, x, layer, f"n {n}, k {k}, m {m}, {dtype}")
            store[1 : m + 1, 8 : n + 8] = 7
            assert bool((store == 7).all()), "written outside the output"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 256, 1024, 24, 7])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_formats(bits: int, group_size: int, act_order: bool, dtype: str) -> None:
    layer = make_layer(
        160, 704, bits=bits, group_size=group_size, symmetric=group_size % 3 == 0,
        act_order=act_order, bias=True, scale_dtype=("F16", "F32")[bits % 3 == 0], seed=bits,
    )  # fmt: skip
    linear = load(layer)
    for m in (1, 16, 33, 70):
        x = normal(m, 704, dtype, seed=m)
        check(linear(x), x, layer, f"m {m}")


def test_types_of_outputs_and_inputs() -> None:
    layer = make_layer(96, 256, seed=1)
    linear = load(layer)
    x = normal(5, 256, "float16")
    wide = torch.empty((5, 96), device="cuda")
    linear(x, out=wide)
    torch.testing.assert_close(wide.half(), linear(x), rtol=0, atol=0)
    exact = linear(x.float())
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, wide, rtol=0, atol=0)
    strided = torch.zeros((5, 512), dtype=torch.float16, device="cuda")[:, 3:259]
    strided.copy_(x)
    torch.testing.assert_close(linear(strided), linear(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_large_values_stay_finite(dtype: str) -> None:
    layer = make_layer(64, 53248, symmetric=False, seed=3)
    x = normal(17, 53248, dtype) * 1e4
    out = torch.empty((17, 64), device="cuda")
    load(layer)(x, out=out)
    assert bool(torch.isfinite(out).all())
    check(out, x, layer, "k 53248")


def test_bitwise_equal_runs_streams_and_threads() -> None:
    linear = load(make_layer(320, 4096, symmetric=False, act_order=True, seed=4))
    for m in (1, 16, 40, 300):
        x = normal(m, 4096, "float16", seed=m)
        first = linear(x)
        for _ in range(20):
            assert torch.equal(linear(x), first)
        failures: list[int] = []

        def work(index: int, x: Any = x, first: Any = first, failures: Any = failures) -> None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                results = [linear(x) for _ in range(10)]
            stream.synchronize()
            if not all(torch.equal(result, first) for result in results):
                failures.append(index)

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


@pytest.mark.parametrize("m", [1, 24, 130])
def test_batch_invariance(m: int) -> None:
    linear = load(make_layer(320, 1408, symmetric=False, seed=5), batch_invariant=True)
    x = normal(m, 1408, "bfloat16", seed=m)
    whole = linear(x)
    for row in {0, m // 2, m - 1}:
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1])


def test_graph_replays_with_new_inputs() -> None:
    layer = make_layer(256, 1024, symmetric=False, act_order=True, seed=6)
    linear = load(layer)
    x = normal(16, 1024, "float16")
    out = torch.empty((16, 256), dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        context = marlinq.Context("cuda", stream=stream.cuda_stream)
        linear(x, out=out, context=context)
        before = context.scratch_allocations
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            linear(x, out=out, context=context)
        assert context.scratch_allocations == before
        for seed in range(1000):
            x.copy_(normal(16, 1024, "float16", seed=seed % 7))
            graph.replay()
            if seed % 100 == 99:
                stream.synchronize()
                check(out, x, layer, f"replay {seed}")
        # The scratch grows afterwards; the graph keeps what it was captured with.
        larger = normal(64, 1024, "float16", seed=9)
        check(linear(larger, context=context), larger, layer, "after the capture")
        assert context.scratch_allocations == before + 1
        graph.replay()
        stream.synchronize()
        check(out, x, layer, "after the growth")


def test_a_capture_without_scratch_says_how_much() -> None:
    linear = load(make_layer(64, 1024, act_order=True, seed=7))
    stream = torch.cuda.Stream()
    context = marlinq.Context("cuda", stream=stream.cuda_stream)
    x = normal(8, 1024, "float16")
    out = torch.empty((8, 64), dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    refusal = r"call pregrow_marlin_gather_scratch\(8192\) before"
    with torch.cuda.graph(graph, stream=stream):
        out.zero_()  # a graph must hold something
        with pytest.raises(InvalidArgumentError, match=refusal):
            linear(x, out=out, context=context)
    context.pregrow_marlin_gather_scratch(8192)
    allocations = context.scratch_allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        linear(x, out=out, context=context)
    assert context.scratch_allocations == allocations


def test_refusals() -> None:
    layer = make_layer(64, 128, seed=8)
    linear = load(layer)
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0"):
        linear(torch.zeros((1, 128), dtype=torch.float16), out=torch.zeros((1, 64)))
    with pytest.raises(InvalidArgumentError, match="out: dtype bfloat16, expected the input's"):
        linear(
            normal(1, 128, "float16"),
            out=torch.empty((1, 64), dtype=torch.bfloat16, device="cuda"),
        )
    with pytest.raises(InvalidArgumentError, match="context: of backend 'cpu'"):
        linear(normal(1, 128, "float16"), context=marlinq.Context("cpu"))
    with pytest.raises(DeviceError, match="cuda:99"):
        load(layer, device="cuda:99")
    with pytest.raises(UnsupportedError, match="compute 'int16'"):
        load(layer, compute="int16")
    with pytest.raises(InvalidArgumentError, match="kernel: 'sm1', expected one of sm80"):
        load(layer, kernel="sm1")


def test_numpy_matches_the_cpu_backend() -> None:
    layer = make_layer(96, 320, bits=8, symmetric=False, act_order=True, bias=True, seed=10)
    x = normal(9, 320, "float16")
    device = load(layer)(x, out=torch.empty((9, 96), device="cuda")).cpu().numpy()
    host = load(layer, device="cpu")(x.float().cpu().numpy())
    assert np.linalg.norm(device - host) <= BOUNDS["float16"] * np.linalg.norm(host)
    assert_close(host, layer.expected(x.float().cpu().numpy()), 2e-6, "cpu")


@pytest.mark.skipif(len(DEVICES) < 2, reason="one CUDA device")
def test_two_devices_in_one_process() -> None:
    layer = make_layer(96, 320, seed=11)
    for device in DEVICES[:2]:
        linear = load(layer, device=device)
        x = normal(4, 320, "float16", device=device)
        check(linear(x), x, layer, device)
