"""Measured schedules on a GPU: what a layer takes of them, and the tuner."""

from pathlib import Path
from typing import Any

import marlinq
import pytest
from cuda_support import (
    DEVICE,
    TYPES,
    DeviceLayer,
    DeviceStack,
    each_kernel,
    guarded,
    needs_device,
    normal,
    reference,
    torch,
    untouched,
)
from gptq_writer import make_layer, write_checkpoint
from marlinq.cli import main
from marlinq.errors import InvalidArgumentError

pytestmark = needs_device

ROWS = [1, 8, 16, 24, 64, 100, 256]
TILES = {
    "sm80": "sm80 tiles features=256 tokens=64 warps=8 cluster=1",
    "sm90": "sm90 tiles features=128 tokens=96 warps=12 cluster=1",
}


def line(one: dict[str, Any], schedule: str) -> str:
    """That schedule for what was tuned, also where the tuner has none: its text is empty then."""
    return (
        f"{one['device']} | {one['kernel']} | w{one['bits']} g{one['group_size']} | "
        f"{one['n']}x{one['k']} | {one['first_rows']}-{one['last_rows']} | {schedule}\n"
    )


@each_kernel
def test_tuned_layers_are_right(arch: str, tmp_path: Path) -> None:
    """Every line that a tuner tells, taken or not by its gain; other rows too."""
    layer = DeviceLayer(1536, 2048, bias=True, seed=5)
    plain = layer.load(kernel=arch)
    tuned = plain.tune(ROWS)
    assert [(one["first_rows"], one["last_rows"]) for one in tuned] == list(
        zip([1, *(m + 1 for m in ROWS)], ROWS, strict=False)
    )
    for one in tuned:
        assert (one["n"], one["k"], one["bits"], one["group_size"]) == (1536, 2048, 4, 128)
        assert one["kernel"] == arch
        assert 0 < one["us"] <= one["estimated_us"]
    path = tmp_path / "schedules.txt"
    path.write_text("".join(one["text"] for one in tuned))
    schedules = marlinq.Schedules.read(path)
    linear = layer.load(kernel=arch, schedules=schedules)
    ranges = [f"{one['first_rows']}-{one['last_rows']}" for one in tuned if one["schedule"]]
    assert len(ranges) > 3
    assert linear.describe()["schedule"].endswith(f"; measured for m {', '.join(ranges)}")
    for dtype in TYPES:
        x = normal(300, 2048, dtype, seed=3)
        expected = reference(layer, x)
        for m in (*ROWS, 3, 12, 70, 200, 257, 300):
            store, out = guarded(m, 1536, x.dtype)
            linear(x[:m], out=out)
            expected.check(out, f"{arch}, m {m}")
            assert untouched(store, out), f"m {m}: written outside the output"


@each_kernel
def test_a_schedule_decides_what_runs(arch: str) -> None:
    """Each of those of 80 rows, against float64 and the same bits each time."""
    layer = DeviceLayer(1024, 4096, act_order=True, seed=6)
    plain = layer.load(kernel=arch)
    (one,) = plain.tune([80])
    x = normal(80, 4096, "float16", seed=4)
    expected = reference(layer, x)
    results = set()
    for share in (1, 2, 3, 4, 8):
        text = line(one, f"{TILES[arch]} share={share}")
        linear = layer.load(kernel=arch, schedules=marlinq.Schedules(text))
        y = linear(x)
        expected.check(y, text)
        assert all(torch.equal(linear(x), y) for _ in range(5))
        results.add(y.double().sum().item())
    assert len(results) > 1, "the cuts of K change no rounding: they were not taken"


def test_a_graph_keeps_its_schedule() -> None:
    layer = DeviceLayer(2048, 2048, seed=8)
    plain = layer.load()
    text = "".join(one["text"] for one in plain.tune([16, 64]))
    linear = layer.load(schedules=marlinq.Schedules(text))
    x = normal(64, 2048, "float16")
    wanted = linear(x)
    graph = torch.cuda.CUDAGraph()
    out = torch.empty_like(wanted)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        linear(x, out=out)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


def test_fused_modules_with_different_orders_are_tuned_apart(tmp_path: Path) -> None:
    layers = {f"m.{i}": make_layer(256, 512, act_order=True, seed=i) for i in range(2)}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers))
    linear = checkpoint.linear(list(layers), device=DEVICE)
    tuned = linear.tune([1, 32])
    assert [(one["n"], one["last_rows"]) for one in tuned] == [(256, 1), (256, 32)] * 2


def test_an_expert_is_tuned_as_a_layer() -> None:
    stack = DeviceStack(3, 256, 512, group_size=128)
    (found,) = stack.load()[1].tune([32])
    assert (found["n"], found["k"], found["group_size"]) == (256, 512, 128)
    assert 0 < found["us"] <= found["estimated_us"]


@each_kernel
def test_batch_invariant_layers_take_none(arch: str) -> None:
    layer = DeviceLayer(1024, 4096, seed=9)
    (one,) = layer.load(kernel=arch).tune([80])
    schedules = marlinq.Schedules(line(one, f"{TILES[arch]} share=1"))
    assert "measured" in layer.load(kernel=arch, schedules=schedules).describe()["schedule"]
    invariant = layer.load(kernel=arch, batch_invariant=True, schedules=schedules)
    assert "measured" not in invariant.describe()["schedule"]
    x = normal(64, 4096, "float16")
    assert torch.equal(invariant(x)[5], invariant(x[5:6])[0])


def test_refusals() -> None:
    layer = DeviceLayer(256, 512, seed=1)
    linear = layer.load()
    for rows in ([0], [5, 5], [8, 4], [1 << 20]):
        with pytest.raises(InvalidArgumentError, match=r"rows: .*expected ascending numbers"):
            linear.tune(rows)
    for dtype in ("float32", "int32"):
        with pytest.raises(InvalidArgumentError, match=r"dtype: .*expected float16 or bfloat16"):
            linear.tune([1], dtype=dtype)
    (one,) = linear.tune([1])
    with pytest.raises(InvalidArgumentError, match="is no schedule, expected one that a tuner"):
        layer.load(schedules=marlinq.Schedules(line(one, "fast")))
    with pytest.raises(InvalidArgumentError, match="has no such schedule; tune this layer again"):
        layer.load(schedules=marlinq.Schedules(line(one, "sm80 tiles features=1")))
    layer = DeviceLayer(1024, 4096, seed=1)
    (one,) = layer.load(kernel="sm80").tune([80])
    twice = 2 * line(one, f"{TILES['sm80']} share=1")
    with pytest.raises(InvalidArgumentError, match="two for 1024x4096 and 1 rows"):
        layer.load(kernel="sm80", schedules=marlinq.Schedules(twice))


def test_tune_in_a_capture_is_refused() -> None:
    layer = DeviceLayer(256, 512, seed=1)
    linear = layer.load()
    stream = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
    x = normal(1, 512, "float16")
    linear(x, context=context)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = linear(x, context=context)
        with pytest.raises(InvalidArgumentError, match="graph capture"):
            linear.tune([1], context=context)
    graph.replay()
    torch.cuda.synchronize()
    reference(layer, x).check(out)


def test_command(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "schedules.txt"
    arguments = ("tune", "--shapes", "512x1024,256x512", "--rows", "1,16,64", "--device", "cuda")
    assert main([*arguments, "--output", str(output), "--least-gain", "-100"]) == 0
    printed = capsys.readouterr().out
    assert "512x1024" in printed
    lines = len(marlinq.Schedules.read(output))
    assert 0 < lines <= 6
    assert f"{output}: {lines} lines" in printed
    assert main([*arguments, "--json"]) == 0
    assert '"estimated_us"' in capsys.readouterr().out
    shape = ("bench", "--shapes", "512x1024", "--rows", "1", "--seconds", "0.01")
    assert main([*shape, "--device", "cuda", "--schedules", str(output)]) == 0
