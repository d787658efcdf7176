"""Several Python threads at once, and the GIL."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import marlinq
import numpy as np
import pytest
from gptq_writer import Array, make_layer, stack_arrays, write_checkpoint
from marlinq import _context
from marlinq.errors import InvalidArgumentError
from support import normal

LAYER = make_layer(192, 320, symmetric=False, act_order=True, bias=True, seed=30)


def test_threads_share_a_weight() -> None:
    linear = marlinq.load_gptq(**LAYER.arrays())
    inputs = [normal((17 + i, 320), seed=20 + i) for i in range(8)]
    expected = [linear(x) for x in inputs]

    def work(seed: int) -> list[Array]:
        own = marlinq.Context("cpu", 1 + seed % 2) if seed % 3 else None
        order = np.random.default_rng(seed).permutation(len(inputs))
        results = {i: linear(inputs[i], context=own) for i in order}
        return [results[i] for i in range(len(inputs))]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(12)):
            for result, wanted in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, wanted)


def test_threads_load_at_once() -> None:
    x = normal((3, 320), seed=30)
    expected = marlinq.load_gptq(**LAYER.arrays())(x)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: marlinq.load_gptq(**LAYER.arrays())(x), range(16)):
            np.testing.assert_array_equal(result, expected)


def test_threads_share_a_checkpoint(tmp_path: Path) -> None:
    names = [f"layers.{i}.proj" for i in range(6)]
    layers = [make_layer(64, 256, symmetric=False, seed=i) for i in range(6)]
    checkpoint = marlinq.open(write_checkpoint(tmp_path, dict(zip(names, layers, strict=True))))
    x = normal((3, 256), seed=1)
    expected = [checkpoint.linear(name)(x) for name in names]
    fresh = marlinq.open(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for result, wanted in zip(
            pool.map(lambda name: fresh.linear(name)(x), names), expected, strict=True
        ):
            np.testing.assert_array_equal(result, wanted)


def test_contexts_that_graphs_use_outlive_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def __init__(self, device: str, *, stream: int) -> None:
            self.captured, self.stream = device == "cuda:1", stream

    monkeypatch.setattr(_context._core, "Context", Stub)
    kept = _context._outliving
    before = list(kept)

    def work() -> tuple[object, object]:
        return _context.context_for("cuda"), _context.context_for("cuda:1")

    with ThreadPoolExecutor(1) as pool:
        plain, captured = pool.submit(work).result()
    gc.collect()
    assert kept == [*before, captured]
    assert plain not in kept
    kept.remove(captured)


@contextmanager
def counting_thread() -> Iterator[Callable[[], int]]:
    """Yields the count of a thread that counts whenever it gets the GIL, and gives it back at once.

    With an endless switch interval the GIL changes hands only where its holder lets go, so the
    count moves during a call exactly if the call does.
    """
    count = 0
    stop = threading.Event()

    def run() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0)

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        thread.start()
        yield lambda: count
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


def _releases_the_gil(call: Callable[[], object]) -> bool:
    """Whether another thread ran during the call; asked several times, it may get no core."""
    call()
    with counting_thread() as count:
        for _ in range(50):
            before = count()
            call()
            if count() != before:
                return True
    return False


def test_the_probe_sees_a_held_gil() -> None:
    words = np.arange(20_000)
    assert not _releases_the_gil(lambda: [int(word) for word in words])


def test_gil_is_released_while_loading(tmp_path: Path) -> None:
    layer = make_layer(2048, 1024, act_order=True, seed=1)
    arrays = layer.arrays()
    assert _releases_the_gil(lambda: marlinq.load_gptq(**arrays))
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {"proj": layer}))
    assert _releases_the_gil(lambda: checkpoint.linear("proj"))
    lists = stack_arrays([layer, layer])
    assert _releases_the_gil(lambda: marlinq.load_gptq_stacked(**lists))


def test_gil_is_released_while_computing() -> None:
    layer = make_layer(2048, 1024, seed=1)
    linear = marlinq.load_gptq(**layer.arrays())
    x = normal((64, 1024), seed=1)
    out = np.empty((64, 2048), np.float32)
    assert _releases_the_gil(lambda: linear(x, out=out))

    stacks = [
        marlinq.load_gptq_stacked(**stack_arrays([make_layer(n, 512, seed=2)] * 4))
        for n in (1024, 512)
    ]
    tokens = normal((64, 512), seed=4)
    ids = np.random.default_rng(5).integers(0, 4, (64, 2))
    shares = np.full((64, 2), 0.5, np.float32)
    target = np.empty((64, 512), np.float32)
    block = marlinq.MoeBlock(*stacks)
    assert _releases_the_gil(lambda: block(tokens, ids, shares, out=target))
    rows = np.empty((64, 1024), np.float32)
    dispatches = [(expert, 16 * expert, 16 * expert, 16) for expert in range(4)]
    assert _releases_the_gil(lambda: stacks[0].gemm_phase_batched(tokens, dispatches, out=rows))


def test_gil_is_released_while_routing() -> None:
    logits = normal((4096, 256), seed=6)
    assert _releases_the_gil(lambda: marlinq.route(logits, 8))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_may_end_before_its_objects(threads: int) -> None:
    x = normal((3, 320), seed=30)

    def work() -> tuple[marlinq.Linear, Array]:
        own = marlinq.Context("cpu", threads)
        linear = marlinq.load_gptq(**LAYER.arrays())
        return linear, linear(x, context=own)

    with ThreadPoolExecutor(1) as pool:
        linear, result = pool.submit(work).result()
    np.testing.assert_array_equal(linear(x), result)


def test_a_context_in_two_threads_is_refused() -> None:
    """Scratch belongs to a context: sharing one must be an error, never a wrong result."""
    layer = make_layer(512, 1024, seed=9)
    linear = marlinq.load_gptq(**layer.arrays())
    context = marlinq.Context("cpu", 1)
    expected = linear(normal((64, 1024), seed=1))

    def run(_: int) -> str | None:
        try:
            result = linear(normal((64, 1024), seed=1), context=context)
        except InvalidArgumentError as error:
            return str(error)
        np.testing.assert_array_equal(result, expected)
        return None

    with ThreadPoolExecutor(4) as pool:
        messages = {message for message in pool.map(run, range(64)) if message}
    assert messages <= {"context: in use by another thread, expected one context per thread"}
    np.testing.assert_array_equal(linear(normal((64, 1024), seed=1), context=context), expected)
