"""`marlinq bench`: how long products and whole blocks take, beside what bounds them."""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from marlinq import _core
from marlinq.cli._arguments import (
    Commands,
    add_checkpoint_options,
    add_load_options,
    arithmetic,
    check_load_options,
    new_command,
    positive,
    rows_list,
)
from marlinq.cli._cases import (
    DEFAULT_SHAPES,
    SEED,
    Case,
    checkpoint_cases,
    load_arguments,
    random_cases,
    random_format,
    random_module,
    random_weight,
    shapes_list,
)
from marlinq.cli._output import duration, print_json, print_line, print_table, progress, size
from marlinq.errors import InvalidArgumentError, MarlinqWarning
from marlinq.linear import ExpertStack, Linear
from marlinq.moe import MoeBlock
from marlinq.schedules import Schedules

_EXAMPLES = """\
  marlinq bench
  marlinq bench --shapes 4096x4096,14336x4096 --rows 1,16,128 --compute float32
  marlinq bench path/to/checkpoint --rows 1 --no-numpy
  marlinq bench --moe qwen3-30b-a3b 64,4,1024,512 --rows 1,32
  marlinq bench --device cuda --rows 1,16,256
  marlinq bench --device cuda --moe --rows 1,16,64,256,1024

Times are medians of repeated bursts. Every call takes the next of several copies of the weight,
enough of them to leave the last-level cache; --hot uses one. GB/s counts packed bytes, and "of
memory" is its share of what reading host memory, or copying memory of a GPU, reached in the same
run. "of peak" is the share of GFLOP/s of what the compute type's own instructions reached on
registers alone, which is not measured on a GPU. A GPU gets float16 and a burst of calls without a
wait between them, so that a kernel shorter than its launch takes as long as the launch, and at most
512 copies; numpy is not measured beside it.

--moe measures whole mixture-of-experts blocks from routed tokens to combined output; --rows counts
tokens. Each call takes the next of several random routings, and packed bytes are those of the
experts that its tokens meet.
"""
_BURST_SECONDS = 0.02
_FEWEST_BURSTS = 5
_ASSUMED_CACHE = 64 << 20
_LEAST_COLD, _MOST_COLD = 64 << 20, 1 << 30  # bytes that the copies of a weight take together
_COLD_ON_DEVICE = 256 << 20  # a few times the cache of a GPU
_MOST_COPIES_ON_DEVICE = 512  # of small weights, which take longer to load than to measure
_FEWEST_ROUTINGS, _MOST_ROUTINGS = 4, 64


@dataclass(frozen=True)
class _MoeShape:
    experts: int
    top_k: int
    hidden: int
    inner: int


_MODELS = {
    "qwen3-30b-a3b": _MoeShape(128, 8, 2048, 768),
    "mixtral-8x7b": _MoeShape(8, 2, 4096, 14336),
    "deepseek-v3": _MoeShape(256, 8, 7168, 2048),
}


def _moe_shape(text: str) -> tuple[str, _MoeShape]:
    if text in _MODELS:
        return text, _MODELS[text]
    parts = text.split(",")
    if len(parts) != len(fields(_MoeShape)):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected four numbers such as 128,8,2048,768, or one of "
            f"{', '.join(_MODELS)}"
        )
    return "moe", _MoeShape(*(positive(part) for part in parts))


def add_command(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = new_command(commands, "bench", _run, "measure products", _EXAMPLES)
    add_checkpoint_options(parser, optional=True)
    add_load_options(parser)
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--shapes",
        type=shapes_list,
        metavar="NxK,...",
        help=f"random weights of these shapes (default: {DEFAULT_SHAPES})",
    )
    parser.add_argument(
        "--moe",
        type=_moe_shape,
        nargs="*",
        metavar="E,TOP_K,HIDDEN,INNER",
        help="whole mixture-of-experts blocks of random weights, by their sizes or by a model's "
        f"name (default: {', '.join(_MODELS)})",
    )
    parser.add_argument(
        "--rows", type=rows_list, default=[1, 16], help="row counts (default: 1,16)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time per measurement (default: 0.5)"
    )
    parser.add_argument(
        "--schedules", metavar="FILE", help="schedules that `marlinq tune` has written"
    )
    parser.add_argument("--hot", action="store_true", help="use one copy of the weight")
    parser.add_argument("--no-numpy", action="store_true", help="do not measure numpy")


def _last_level_cache() -> int:
    """Bytes of the largest cache that Linux tells of, else a guess."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [_ASSUMED_CACHE]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[-1:] in units and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def _cold_bytes(device: str) -> int:
    """So many bytes leave no room in the cache for those that were read before them."""
    if device != "cpu":
        return _COLD_ON_DEVICE
    return min(max(2 * _last_level_cache(), _LEAST_COLD), _MOST_COLD)


def _copies(nbytes: int, *, hot: bool, device: str = "cpu") -> int:
    if hot:
        return 1
    copies = max(1, -(-_cold_bytes(device) // max(nbytes, 1)))
    return copies if device == "cpu" else min(copies, _MOST_COPIES_ON_DEVICE)


def _memory_speed(context: _core.Context) -> float:
    """Bytes a second: read by all threads from host memory, or read and written by a GPU's copy."""
    count = _cold_bytes(context.device) // 4
    if context.backend != "cpu":
        source, target = (_core.DeviceBuffer(context, [count], "float32") for _ in range(2))

        def copies(_: int, times: int) -> float:
            context.synchronise()
            start = time.perf_counter()
            for _ in range(times):
                context.copy(source, target)
            context.synchronise()
            return time.perf_counter() - start

        return 2 * 4 * count / _measure(copies, _BURST_SECONDS)
    pieces = np.array_split(np.ones(count, np.float32), context.threads)
    with ThreadPoolExecutor(context.threads) as pool:
        reads = _round([lambda: list(pool.map(np.dot, pieces, pieces))])
        return 4 * count / _measure(reads, _BURST_SECONDS)


def _measure(burst: Callable[[int, int], float], seconds: float) -> float:
    """Median seconds of one call; `burst(first, count)` times calls `first` to `first + count`."""
    position = 0

    def once(length: int) -> float:
        nonlocal position
        position += length
        return burst(position - length, length) / length

    shortest = min(once(1) for _ in range(3))
    length = max(1, round(_BURST_SECONDS / max(shortest, 1e-9)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_BURSTS or time.perf_counter() < end:
        times.append(once(length))
    return statistics.median(times)


def _round(calls: list[Callable[[], object]]) -> Callable[[int, int], float]:
    """Bursts that go round all of the calls."""

    def burst(first: int, count: int) -> float:
        start = time.perf_counter()
        for position in range(first, first + count):
            calls[position % len(calls)]()
        return time.perf_counter() - start

    return burst


def _matmul(x: Any, weight: Any) -> Callable[[], object]:
    out = np.empty((len(x), len(weight)), np.float32)
    return lambda: np.matmul(x, weight.T, out=out)


def _on_device(array: Any, context: _core.Context) -> Any:
    """The array, or a copy of it on a GPU."""
    if context.backend == "cpu":
        return array
    there = _core.DeviceBuffer(context, array.shape, str(array.dtype))
    context.copy(array, there)
    return there


def _activations(array: Any, context: _core.Context) -> Any:
    """The same for rows of x and of outputs, which are float16 on a GPU."""
    return _on_device(array if context.backend == "cpu" else array.astype(np.float16), context)


def _forwards(layers: list[Linear], x: Any, context: _core.Context) -> Callable[[int, int], float]:
    """Bursts of forwards of x."""
    handles = [layer._handle for layer in layers]
    out = _activations(np.zeros((len(x), layers[0].out_features), np.float32), context)
    x = _activations(x, context)
    return lambda first, count: _core.time_forwards(
        context, handles, x, out, first=first, count=count
    )


def _bench_case(
    case: Case, options: argparse.Namespace, context: _core.Context
) -> list[dict[str, Any]]:
    layers = [case.load()]
    chosen = layers[0].describe()
    packed = chosen["packed_bytes"]
    copies = _copies(packed, hot=options.hot, device=context.device)
    layers += [case.load() for _ in range(copies - 1)]
    matrices = []
    if not options.no_numpy and context.backend == "cpu":
        matrices = [case.reference.dequantize(np.float32)]
        copies = _copies(matrices[0].nbytes, hot=options.hot)
        matrices += [matrices[0].copy() for _ in range(copies - 1)]
    results = []
    for m in options.rows:
        k, n = layers[0].in_features, layers[0].out_features
        x = np.random.default_rng(SEED).standard_normal((m, k), np.float32)
        seconds = _measure(_forwards(layers, x, context), options.seconds)
        numpy = None
        if matrices:
            numpy = _measure(_round([_matmul(x, matrix) for matrix in matrices]), options.seconds)
        results.append(
            {
                "name": case.name,
                "count": case.count,
                "n": n,
                "k": k,
                "bits": case.bits,
                "group_size": case.group_size,
                "act_order": chosen["act_order"],
                "kernel": chosen["kernel"],
                "compute": arithmetic(chosen),
                "device": context.device,
                "threads": context.threads,
                "copies": len(layers),
                "m": m,
                "packed_bytes": packed,
                "seconds": seconds,
                "gb_per_second": packed / seconds / 1e9,
                "gflop_per_second": 2 * m * n * k / seconds / 1e9,
                "numpy_seconds": numpy,
                "speedup": None if numpy is None else numpy / seconds,
            }
        )
    return results


def _random_stack(
    experts: int, n: int, k: int, options: argparse.Namespace, context: _core.Context
) -> ExpertStack:
    bits, group_size = random_format(options)
    # A few different experts stand for all: what they hold does not change the time.
    weights = [random_weight(n, k, bits, group_size, SEED + i) for i in range(min(experts, 4))]
    return ExpertStack(
        _core.load_gptq_stacked(
            context,
            [[random_module(weights[index % len(weights)])] for index in range(experts)],
            bits=bits,
            group_size=group_size,
            k=k,
            **load_arguments(options),
        )
    )


def _routings(shape: _MoeShape, tokens: int, count: int) -> list[Any]:
    """Ids of distinct experts for each token, uniform."""
    random = np.random.default_rng(SEED)
    scores = (random.random((tokens, shape.experts), np.float32) for _ in range(count))
    return [
        np.argpartition(score, shape.top_k - 1)[:, : shape.top_k].astype(np.int32)
        for score in scores
    ]


def _bench_moe(
    name: str, shape: _MoeShape, options: argparse.Namespace, context: _core.Context
) -> list[dict[str, Any]]:
    if shape.top_k > shape.experts:
        raise InvalidArgumentError(f"--moe: top_k {shape.top_k} of {shape.experts} experts")

    def block() -> MoeBlock:
        gate_up = _random_stack(shape.experts, 2 * shape.inner, shape.hidden, options, context)
        down = _random_stack(shape.experts, shape.hidden, shape.inner, options, context)
        return MoeBlock(gate_up, down, context=context)

    blocks = [block()]
    parts = blocks[0].describe()
    packed = parts["gate_up"]["packed_bytes"] + parts["down"]["packed_bytes"]
    blocks += [block() for _ in range(_copies(packed, hot=options.hot, device=context.device) - 1)]
    handles = [each._handle for each in blocks]
    results = []
    for m in options.rows:
        x = np.random.default_rng(SEED).standard_normal((m, shape.hidden), np.float32)
        out = _activations(np.zeros_like(x), context)
        x = _activations(x, context)
        count = 1
        if not options.hot:
            met = packed * min(m * shape.top_k, shape.experts) // shape.experts
            count = -(-_cold_bytes(context.device) // max(met, 1))
            count = min(max(count, _FEWEST_ROUTINGS), _MOST_ROUTINGS)
        routings = _routings(shape, m, count)
        met = sum(len(np.unique(ids)) for ids in routings) / count
        ids = [_on_device(each, context) for each in routings]
        shares = np.full((m, shape.top_k), 1 / shape.top_k, np.float32)
        weights = _on_device(shares, context)

        def burst(
            first: int,
            count: int,
            x: Any = x,
            ids: Any = ids,
            weights: Any = weights,
            out: Any = out,
        ) -> float:
            return _core.time_blocks(
                context, handles, x, ids, weights, out, first=first, count=count
            )

        seconds = _measure(burst, options.seconds)
        touched = round(packed * met / shape.experts)
        flops = 2 * m * shape.top_k * 3 * shape.hidden * shape.inner
        results.append(
            {
                "name": f"{name} {shape.experts} experts, top {shape.top_k}",
                "count": 1,
                "experts": shape.experts,
                "top_k": shape.top_k,
                "n": shape.inner,
                "k": shape.hidden,
                "bits": parts["gate_up"]["bits"],
                "group_size": parts["gate_up"]["group_size"],
                "act_order": False,
                "kernel": parts["gate_up"]["kernel"],
                "compute": arithmetic(parts["gate_up"]),
                "device": context.device,
                "threads": context.threads,
                "copies": len(blocks),
                "routings": len(ids),
                "m": m,
                "packed_bytes": touched,
                "seconds": seconds,
                "gb_per_second": touched / seconds / 1e9,
                "gflop_per_second": flops / seconds / 1e9,
                "numpy_seconds": None,
                "speedup": None,
            }
        )
    return results


def _print(results: list[dict[str, Any]]) -> None:
    measured = ("m", "packed", "time", "GB/s", "of memory", "GFLOP/s", "of peak", "numpy", "ratio")
    numeric = ("count", "N x K", *measured)
    print_table(
        ("weight", "count", "N x K", "format", "kernel", *measured),
        (
            (
                r["name"],
                r["count"],
                f"{r['n']} x {r['k']}",
                f"{r['bits']} bits g{r['group_size']}{' act-order' if r['act_order'] else ''}",
                f"{r['kernel']} {r['compute']}",
                r["m"],
                size(r["packed_bytes"]),
                duration(r["seconds"]),
                f"{r['gb_per_second']:.1f}",
                "" if r["memory_share"] is None else f"{r['memory_share']:.0%}",
                f"{r['gflop_per_second']:.0f}",
                "" if r["peak_share"] is None else f"{r['peak_share']:.0%}",
                "" if r["numpy_seconds"] is None else duration(r["numpy_seconds"]),
                "" if r["speedup"] is None else f"{r['speedup']:.2f}",
            )
            for r in results
        ),
        numeric=numeric,
    )


def _run(options: argparse.Namespace) -> int:
    if options.checkpoint is not None and (options.shapes or options.moe):
        raise InvalidArgumentError(
            "--shapes and --moe are for random weights, not for a checkpoint"
        )
    context = _core.Context(options.device, options.threads)
    check_load_options(options, context)
    results: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarlinqWarning)
        if options.moe is not None:
            blocks = options.moe or list(_MODELS.items())
            with progress("measuring", len(blocks)) as advance:
                for name, shape in blocks:
                    advance(name)
                    results += _bench_moe(name, shape, options, context)
        if options.moe is None or options.shapes:
            cases = random_cases if options.checkpoint is None else checkpoint_cases
            schedules = Schedules.read(options.schedules) if options.schedules else None
            listed = list(cases(options, context, schedules))
            with progress("measuring", len(listed)) as advance:
                for case in listed:
                    advance(case.name)
                    results += _bench_case(case, options, context)
    # Weights that stay in a cache are not bound by memory.
    memory = None if options.hot else _memory_speed(context) / 1e9
    peak = context.peak_rate(**load_arguments(options)) / 1e9 or None
    for result in results:
        result["memory_share"] = None if memory is None else result["gb_per_second"] / memory
        result["peak_share"] = None if peak is None else result["gflop_per_second"] / peak
    if options.json:
        print_json(
            {
                "device": context.device,
                "threads": context.threads,
                "memory_gb_per_second": memory,
                "peak_gflop_per_second": peak,
                "results": results,
            }
        )
    else:
        _print(results)
        print_line("")
        if context.backend == "cpu":
            print_line(f"{context.threads} threads; ratio: numpy's time on float32 over marlinq's")
        else:
            print_line(f"{context.device}, float16, calls without a wait between them")
        if memory is not None:
            how = (
                "read by all threads" if context.backend == "cpu" else "read and written by a copy"
            )
            print_line(f"memory: {memory:.1f} GB/s, {how}")
    return 0
