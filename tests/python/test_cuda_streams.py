"""The CUDA backend on streams, threads, graphs and devices: the same bits, no allocation."""

import gc
from typing import Any

import marlinq
import pytest
from cuda_support import (
    DEVICE,
    DEVICES,
    TYPES,
    DeviceLayer,
    in_threads,
    needs_device,
    needs_two_devices,
    normal,
    reference,
    torch,
)
from marlinq._context import context_for
from marlinq.errors import InvalidArgumentError

pytestmark = needs_device


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 300])
def test_the_same_bits_every_time(m: int, act_order: bool) -> None:
    linear = DeviceLayer(320, 4096, act_order=act_order, seed=4).load()
    for dtype in TYPES:
        x = normal(m, 4096, dtype, seed=m)
        first = linear(x)
        same = torch.ones((), dtype=torch.bool, device=DEVICE)
        for _ in range(100):
            same &= (linear(x) == first).all()
        assert bool(same)


@pytest.mark.parametrize("m", [1, 16, 40, 300])
def test_threads_and_streams_share_a_weight(m: int) -> None:
    """8 threads with 8 streams each, all at once and without a wait between them."""
    linear = DeviceLayer(320, 4096, act_order=True, bias=True, seed=4).load()
    x = normal(m, 4096, "float16", seed=m)
    first = linear(x)
    torch.cuda.synchronize()

    def work(index: int) -> None:
        streams = [torch.cuda.Stream() for _ in range(8)]
        results = []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(linear(x))
        for stream in streams:
            stream.synchronize()
        assert all(torch.equal(result, first) for result in results), f"thread {index}"

    in_threads(8, work)


def test_threads_load_at_once() -> None:
    layer = DeviceLayer(192, 512, act_order=True, seed=5)
    x = normal(17, 512, "float16")
    expected = reference(layer, x)
    torch.cuda.synchronize()

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                expected.check(layer.load()(x), f"thread {index}")

    in_threads(8, work)


def test_the_current_stream_is_used() -> None:
    """A call behind slow work of the current stream sees its results; the default stream waits for
    nobody."""
    linear = DeviceLayer(128, 1024, act_order=True, seed=6).load()
    old, new = normal(16, 1024, "float16", seed=1), normal(16, 1024, "float16", seed=2)
    expected = linear(new)
    x = old.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(x)  # whatever is made once for a stream
    stream.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(new)
        y = linear(x)
    done_at_once = stream.query()
    stream.synchronize()
    assert not done_at_once, "the call waited for the stream"
    assert torch.equal(y, expected)
    # The default stream has the handle 0.
    assert torch.cuda.default_stream().cuda_stream == 0
    assert context_for(DEVICE, like=x) is context_for("cuda", like=x)
    assert context_for(DEVICE, like=x).stream == 0
    with torch.cuda.stream(stream):
        assert context_for(DEVICE, like=x).stream == stream.cuda_stream


@pytest.mark.parametrize("act_order", [False, True])
def test_a_repeated_size_allocates_nothing(act_order: bool) -> None:
    linear = DeviceLayer(320, 1408, act_order=act_order, seed=7).load()
    context = marlinq.Context(DEVICE, stream=torch.cuda.current_stream().cuda_stream)
    x = normal(257, 1408, "float16")
    out = torch.empty((257, 320), dtype=torch.float16, device=DEVICE)
    sizes = (257, 1, 16, 64, 256, 257)
    for m in sizes:  # the driver too loads each kernel when it is first launched
        linear(x[:m], out=out[:m], context=context)
    torch.cuda.synchronize()
    grown = context.scratch_allocations
    free = torch.cuda.mem_get_info()[0]
    for m in sizes:
        linear(x[:m], out=out[:m], context=context)
    torch.cuda.synchronize()
    assert context.scratch_allocations == grown
    assert torch.cuda.mem_get_info()[0] == free


def test_pregrown_scratch_does_not_grow() -> None:
    linear = DeviceLayer(96, 1000, act_order=True, seed=7).load()
    context = marlinq.Context(DEVICE)
    context.pregrow_marlin_gather_scratch(300 * 1000)
    grown = context.scratch_allocations
    context.pregrow_marlin_gather_scratch(300 * 1000)
    context.pregrow_marlin_gather_scratch(1)
    assert context.scratch_allocations == grown
    for m in (1, 64, 300):
        linear(normal(m, 1000, "float16"), context=context)
    torch.cuda.synchronize()
    assert context.scratch_allocations == grown
    with pytest.raises(InvalidArgumentError, match="required_elements: -1, expected at least 0"):
        context.pregrow_marlin_gather_scratch(-1)


def test_forgotten_layers_give_their_memory_back() -> None:
    layer = DeviceLayer(4096, 4096, seed=8)
    layer.load()
    gc.collect()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        layer.load()
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= free - (4 << 20)


@pytest.mark.parametrize("m", [1, 7, 16, 17, 64, 130])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_row_does_not_depend_on_its_batch(m: int, act_order: bool) -> None:
    layer = DeviceLayer(320, 1408, act_order=act_order, bias=True, seed=5)
    linear = layer.load(batch_invariant=True)
    for dtype in TYPES:
        x = normal(m, 1408, dtype, seed=m)
        whole = linear(x)
        reference(layer, x).check(whole)
        for first, rows in {(0, 1), (m // 2, 1), (m - 1, 1), (0, min(m, 9)), (m // 3, m - m // 3)}:
            part = linear(x[first : first + rows])
            assert torch.equal(part, whole[first : first + rows]), (dtype, first, rows)


@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size"),
    [
        (4096, 4096, 4, 128),
        (6144, 1088, 4, 64),
        (4096, 1024, 4, 64),
        (3000, 2112, 4, 32),
        (28672, 512, 8, -1),
        (1000, 2048, 4, 128),
    ],
)
def test_rows_of_large_layers_do_not_depend_on_their_batch(
    n: int, k: int, bits: int, group_size: int
) -> None:
    """Tiles of every size, of which a block has many."""
    layer = DeviceLayer(n, k, bits=bits, group_size=group_size, seed=n)
    linear = layer.load(batch_invariant=True)
    for dtype in TYPES:
        x = normal(1500, k, dtype, seed=k)
        whole = linear(x)
        reference(layer, x).check(whole)
        for first, rows in [
            (0, 1),
            (77, 8),
            (5, 32),
            (1400, 33),
            (9, 64),
            (64, 100),
            (3, 129),
            (200, 300),
            (0, 700),
        ]:
            part = linear(x[first : first + rows])
            assert torch.equal(part, whole[first : first + rows]), (dtype, first, rows)


# --- graphs ---


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 16, 17, 64, 256])
def test_capture_as_torch_does_it(m: int, dtype: str) -> None:
    """Warm up on a stream, capture on another one that torch makes, new inputs, replay."""
    layer = DeviceLayer(320, 1408, bias=True, seed=9)
    linear = layer.load()
    x = normal(m, 1408, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    for seed in range(5):
        x.copy_(normal(m, 1408, dtype, seed=seed))
        graph.replay()
        assert torch.equal(y, linear(x))
        reference(layer, x).check(y)


def test_replays_with_new_inputs_and_scratch_that_grows() -> None:
    layer = DeviceLayer(256, 1024, act_order=True, seed=6)
    linear = layer.load()
    inputs = [normal(16, 1024, "float16", seed=seed) for seed in range(7)]
    wanted = [linear(x) for x in inputs]
    x = inputs[0].clone()
    out = torch.empty((16, 256), dtype=torch.float16, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
        linear(x, out=out, context=context)
        before = context.scratch_allocations
        assert not context.captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            linear(x, out=out, context=context)
        assert context.captured
        assert context.scratch_allocations == before
        same = torch.ones((), dtype=torch.bool, device=DEVICE)
        for replay in range(1000):
            x.copy_(inputs[replay % 7])
            graph.replay()
            same &= (out == wanted[replay % 7]).all()
        assert bool(same)
        # The scratch grows afterwards; the graph keeps what it was captured with.
        for m in (64, 4096):
            larger = normal(m, 1024, "float16", seed=m)
            reference(layer, larger).check(linear(larger, context=context), "after the capture")
        assert context.scratch_allocations > before
        rubbish = [torch.full((1 << 22,), 7.0, device=DEVICE) for _ in range(8)]
        for replay in range(100):
            x.copy_(inputs[replay % 7])
            graph.replay()
            same &= (out == wanted[replay % 7]).all()
        assert bool(same)
        stream.synchronize()
    del rubbish


def test_several_layers_in_one_graph() -> None:
    """A chain whose links read what the link before wrote, with dependent launches between them."""
    layers = [DeviceLayer(512, 512, act_order=i % 2 == 1, seed=20 + i).load() for i in range(6)]
    stream = torch.cuda.Stream()
    x = normal(3, 512, "bfloat16")

    def chain() -> Any:
        y = x
        for linear in layers:
            y = linear(y)
            y = y / 8
        return y

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        first = chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = chain()
        for _ in range(20):
            y.zero_()
            graph.replay()
            assert torch.equal(y, first)
    stream.synchronize()


def test_a_graph_of_a_thread_that_ended() -> None:
    """The thread's own contexts live on with the memory that the graph uses."""
    layer = DeviceLayer(256, 2048, act_order=True, seed=10)
    linear = layer.load()
    x = normal(40, 2048, "float16")
    wanted = linear(x)
    torch.cuda.synchronize()
    captured: dict[str, Any] = {}

    def work(_: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            captured["y"] = torch.empty((40, 256), dtype=torch.float16, device=DEVICE)
            linear(x, out=captured["y"])
            captured["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured["graph"], stream=stream):
                linear(x, out=captured["y"])
        stream.synchronize()

    in_threads(1, work)
    gc.collect()
    others = [DeviceLayer(256, 2048, seed=i).load() for i in range(4)]
    rubbish = [torch.full((1 << 22,), 7.0, device=DEVICE) for _ in range(8)]
    captured["y"].zero_()
    captured["graph"].replay()
    torch.cuda.synchronize()
    assert torch.equal(captured["y"], wanted)
    del others, rubbish


def test_a_capture_without_scratch_says_how_much() -> None:
    linear = DeviceLayer(64, 1024, act_order=True, seed=7).load()
    stream = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
    x = normal(8, 1024, "float16")
    out = torch.empty((8, 64), dtype=torch.float16, device=DEVICE)
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
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, linear(x))


# --- devices ---


@needs_two_devices
def test_two_devices_in_one_process() -> None:
    """Each weight knows its device, whatever device is current."""
    layer = DeviceLayer(96, 320, act_order=True, seed=11)
    linears = {device: layer.load(device=device) for device in DEVICES[:2]}
    for device, linear in linears.items():
        assert linear.device == linear.describe()["device"] == device
        for current in range(2):
            with torch.cuda.device(current):
                for m in (1, 16, 64):
                    x = normal(m, 320, "float16", device=device, seed=m)
                    y = linear(x)
                    assert y.device == torch.device(device)
                    reference(layer, x).check(y, device)
                    assert torch.cuda.current_device() == current
    here, there = DEVICES[:2]
    with pytest.raises(InvalidArgumentError, match=f"x: on {there}, expected {here}"):
        linears[here](normal(1, 320, "float16", device=there))
    with pytest.raises(InvalidArgumentError, match=f"out: on {there}, expected {here}"):
        linears[here](
            normal(1, 320, "float16", device=here),
            out=torch.empty((1, 96), dtype=torch.float16, device=there),
        )
    with pytest.raises(InvalidArgumentError, match=f"context: on {there}, expected {here}"):
        linears[here](normal(1, 320, "float16", device=here), context=marlinq.Context(there))


@needs_two_devices
def test_two_devices_at_once() -> None:
    layer = DeviceLayer(320, 2048, act_order=True, seed=12)
    linears = [layer.load(device=device) for device in DEVICES[:2]]
    inputs = [normal(33, 2048, "float16", device=device) for device in DEVICES[:2]]
    wanted = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
    for device in range(2):
        torch.cuda.synchronize(device)

    def work(index: int) -> None:
        device = index % 2
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            for _ in range(20):
                assert torch.equal(linears[device](inputs[device]), wanted[device])

    in_threads(8, work)
