"""The CUDA backend against float64; skipped where there is no device."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from cuda_support import (
    BOUNDS,
    DEVICE,
    KERNELS,
    TYPES,
    DeviceLayer,
    Reference,
    each_kernel,
    guarded,
    host,
    load,
    needs_device,
    normal,
    reference,
    torch,
    untouched,
)
from gptq_writer import TINY_SCALE, Layer, make_layer, with_zeros, write_checkpoint
from marlinq.cli import main
from safetensors.numpy import load_file
from support import DATA, assert_close

pytestmark = needs_device


SIZES = [1, 7, 32, 60, 64, 96, 192, 320, 416, 576, 704, 1408, 10944]
ROWS = [0, 1, 7, 16, 17, 63, 64, 65, 257, 1000]
CHECKPOINTS = sorted(path.parent.name for path in DATA.glob("*/expected.safetensors"))


def in_turn(index: int) -> str:
    """One of the architectures: tests that take their time run each layer on one of them."""
    return KERNELS[index % len(KERNELS)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_shapes(n: int, k: int) -> None:
    layer = DeviceLayer(n, k, seed=n + k)
    linear = layer.load(kernel=in_turn(SIZES.index(n) + SIZES.index(k)))
    dense = layer.dense()
    for dtype in TYPES:
        x = normal(max(ROWS), k, dtype, seed=k)
        expected = Reference(dense, None, x)
        for m in ROWS:
            store, out = guarded(m, n, x.dtype)
            linear(x[:m], out=out)
            if m:
                expected.check(out, f"n {n}, k {k}")
            assert untouched(store, out), f"n {n}, k {k}, m {m}: written outside the output"


@pytest.mark.parametrize("k", [58112, 58120, 60001])
def test_act_order_of_long_rows(k: int) -> None:
    """Around the K up to which two rows of x have room in the shared memory of an H100."""
    layer = DeviceLayer(96, k, act_order=True, bias=True, seed=k)
    linear = layer.load()
    for dtype in TYPES:
        x = normal(130, k, dtype, seed=k)
        expected = reference(layer, x)
        for m in (1, 2, 3, 17, 64, 130):
            store, out = guarded(m, 96, x.dtype)
            linear(x[:m], out=out)
            expected.check(out, f"k {k}")
            assert untouched(store, out), f"k {k}, m {m}: written outside the output"


def unbalanced(layer: Layer, seed: int) -> Layer:
    """Rows in groups of very different sizes, some of them empty."""
    share = np.random.default_rng(seed).random(layer.k)
    return replace(layer, groups=(share * share * len(layer.scales)).astype(np.int64))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 7, 16, 24, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("order", ["none", "shuffled", "unbalanced"])
def test_formats(bits: int, group_size: int, order: str) -> None:
    seeds = itertools.count(bits)
    kinds = itertools.product([False, True], ["F16", "BF16", "F32"])
    for index, (symmetric, scale_dtype) in enumerate(kinds):
        layer = make_layer(
            160,
            704,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            act_order=order == "shuffled",
            bias=not symmetric,
            scale_dtype=scale_dtype,
            seed=next(seeds),
        )
        if order == "unbalanced":
            layer = unbalanced(layer, seed=next(seeds))
        linear = load(layer, kernel=in_turn(index + bits // 4))
        assert linear.describe()["act_order"] == (not np.array_equal(layer.groups, natural(layer)))
        for dtype in TYPES:
            x = normal(70, 704, dtype, seed=next(seeds))
            expected = reference(layer, x)
            for m in (1, 16, 33, 70):
                expected.check(linear(x[:m]), f"symmetric {symmetric}, scales {scale_dtype}")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("largest", [1e-5, 0.01, 63.0, 100.0, 60000.0])
def test_scales_of_every_size(bits: int, group_size: int, largest: float) -> None:
    """Subnormal ones included, and those whose products with codes float16 cannot hold."""
    layer = DeviceLayer(640, 736, bits=bits, group_size=group_size, seed=bits)
    layer.scales = (layer.scales * (largest / layer.scales.max().item())).half()
    linear = layer.load()
    x = normal(300, 736, "float16", seed=group_size)
    expected = reference(layer, x)
    for m in (1, 16, 33, 130, 300):
        out = torch.empty((m, 640), device=DEVICE)
        expected.check(linear(x[:m], out=out), f"scales up to {largest}")


def natural(layer: Layer) -> Any:
    rows = layer.k if layer.group_size == -1 else layer.group_size
    return np.arange(layer.k) // rows


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_points_of_every_value(layout: str) -> None:
    """0 included, which the older convention stores as a borrow."""
    layer = make_layer(96, 256, group_size=64, symmetric=False, seed=2)
    zeros = np.arange(4 * 96).reshape(4, 96) % 16
    layer = with_zeros(layer, zeros)
    linear = marlinq.load_gptq(
        **layer.arrays(layout), group_size=64, device=DEVICE, checkpoint_format=layout
    )
    x = normal(33, 256, "float16", seed=1)
    reference(layer, x).check(linear(x))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stored_checkpoints(name: str) -> None:
    """Every module against float64, and against what another program computed."""
    checkpoint = marlinq.open(DATA / name)
    stored = load_file(DATA / name / "expected.safetensors")
    compared = 0
    for info in checkpoint.modules():
        linear = checkpoint.linear(info.name, device=DEVICE)
        weight = checkpoint.reference(info.name)
        dense = torch.from_numpy(weight.dequantize(np.float64)).to(DEVICE)
        bias = (
            None if weight.bias is None else torch.from_numpy(np.asarray(weight.bias, np.float64))
        )
        bias = None if bias is None else bias.to(DEVICE)
        for dtype in TYPES:
            x = normal(130, linear.in_features, dtype)
            expected = Reference(dense, bias, x)
            for m in (1, 5, 33, 130):
                expected.check(linear(x[:m]), info.name)
        for m in (1, 5, 33):
            if f"{info.name}.x{m}" not in stored:
                continue
            wanted = stored[f"{info.name}.y{m}"]
            result = linear(stored[f"{info.name}.x{m}"])
            # The stored x is float32: rounding it adds an error like the output's own.
            error = np.linalg.norm(result - wanted) / np.linalg.norm(wanted)
            assert error <= 2 * BOUNDS["float16"], f"{info.name}, {m} rows: {error:.2e}"
            compared += 1
    names = {info.name for info in checkpoint.modules()}
    wanted_products = [
        key
        for key in stored
        if key.rpartition(".")[0] in names and key.rpartition(".")[2] in ("y1", "y5", "y33")
    ]
    assert compared == len(wanted_products)


@each_kernel
def test_types_of_outputs_and_inputs(arch: str) -> None:
    layer = DeviceLayer(96, 256, seed=1)
    linear = layer.load(kernel=arch)
    for dtype in TYPES:
        x = normal(70, 256, dtype)
        for m in (1, 16, 70):
            wide = torch.empty((m, 96), device=DEVICE)
            linear(x[:m], out=wide)
            # One rounding at the end: that of the float32 output is the other one.
            assert torch.equal(wide.to(x.dtype), linear(x[:m]))
    x = normal(70, 256, "float16")
    for m in (1, 16, 70):
        wide = torch.empty((m, 96), device=DEVICE)
        linear(x[:m], out=wide)
        exact = linear(x[:m].float())
        assert exact.dtype == torch.float32
        assert torch.equal(exact, wide)
    # float32 inputs are rounded to float16, nearest even.
    odd = normal(16, 256, "float32")
    assert torch.equal(linear(odd), linear(odd.half().float()))


@each_kernel
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("n", [96, 61])
def test_strides_and_alignments(n: int, act_order: bool, arch: str) -> None:
    """Any row stride and any address that is a multiple of the element."""
    layer = DeviceLayer(n, 320, act_order=act_order, bias=True, seed=4)
    linear = layer.load(kernel=arch)
    for dtype in [*TYPES, "float32"]:
        x = normal(33, 320, dtype, seed=1)
        for stride, offset in ((328, 0), (336, 8), (321, 0), (327, 3), (320, 1), (324, 4)):
            memory = torch.zeros(34 * stride + offset, dtype=x.dtype, device=DEVICE)
            moved = memory[offset : offset + 33 * stride].view(33, stride)[:, :320]
            moved.copy_(x)
            for m in (1, 16, 33):
                assert torch.equal(linear(moved[:m]), linear(x[:m])), (dtype, stride, offset, m)
        for offset in (1, 2, 3, 8):
            for m in (1, 16, 33):
                store, out = guarded(m, n, x.dtype, offset)
                linear(x[:m], out=out)
                assert torch.equal(out, linear(x[:m])), (dtype, offset, m)
                assert untouched(store, out), (dtype, offset, m)


def test_shapes_of_x() -> None:
    linear = DeviceLayer(96, 256, seed=1).load()
    x = normal(24, 256, "float16")
    y = linear(x)
    assert torch.equal(linear(x.view(2, 3, 4, 256)), y.view(2, 3, 4, 96))
    assert linear(x[0]).shape == (96,)
    assert linear(x[:0]).shape == (0, 96)
    assert linear(x.view(2, 12, 256)[:, :0]).shape == (2, 0, 96)


@each_kernel
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_large_values_stay_finite(dtype: str, act_order: bool, arch: str) -> None:
    layer = DeviceLayer(64, 53248, act_order=act_order, seed=3)
    x = (normal(300, 53248, dtype) * 1e4).clamp(-6e4, 6e4)
    expected = reference(layer, x)
    linear = layer.load(kernel=arch)
    layer.scales /= 256  # a power of two: the same numbers, and results that float16 holds
    small = layer.load(kernel=arch)
    for m in (1, 16, 17, 64, 300):
        out = torch.empty((m, 64), device=DEVICE)
        linear(x[:m], out=out)
        assert bool(torch.isfinite(out).all())
        expected.check(out)
        narrow = small(x[:m])
        assert bool(torch.isfinite(narrow).all())
        expected.check(narrow.double() * 256)


def check_each_column(y: Any, layer: Layer, x: Any, what: object) -> None:
    """Every column against its own numbers, so that a large one cannot hide a small one."""
    dense = torch.from_numpy(layer.dense()).to(x.device)
    wide = x.double()
    difference = torch.linalg.norm(y.double() - wide @ dense.T, dim=0)
    scale = torch.sqrt(torch.sum((wide**2) @ (dense**2).T, dim=0))
    bound = 3 * BOUNDS[str(x.dtype).removeprefix("torch.")]
    assert bool((difference <= bound * scale).all()), what


@each_kernel
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_extreme_scales(dtype: str, act_order: bool, arch: str) -> None:
    """Zero, the smallest numbers of float16 and nearly the largest, in one layer."""
    layer = make_layer(96, 512, symmetric=False, act_order=act_order, seed=11)
    values = np.array([0.0, 1e-7, 6e4, 6e-5, 1.0], np.float16).astype(np.float64)
    scales = values[np.arange(4 * 96).reshape(4, 96) % 5]
    scales[:, :5] = values  # whole columns of each
    layer = replace(layer, scales=scales)
    linear = load(layer, kernel=arch)
    x = normal(130, 512, dtype, seed=2)
    for m in (1, 16, 17, 130):
        out = torch.empty((m, 96), device=DEVICE)
        linear(x[:m], out=out)
        assert bool(torch.isfinite(out).all())
        assert bool((out[:, 0] == 0).all())
        check_each_column(out, layer, x[:m], f"m {m}")


@each_kernel
@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_of_any_size_in_one_column(
    scale_dtype: str, act_order: bool, symmetric: bool, arch: str
) -> None:
    layer = make_layer(
        70, 512, symmetric=symmetric, act_order=act_order, scale_dtype=scale_dtype, seed=12
    )
    factors = np.array([[1e30], [1e-35], [1e25], [1e-20]]) / (1 + np.arange(70) % 3)
    factors[3, ::2] = 0  # half of the columns have nothing but the smallest beside the large ones
    factors[1, ::7] = 1
    scales = (layer.scales * factors).astype(np.float32).astype(np.float64)
    if scale_dtype == "BF16":  # cut, not rounded: any numbers that bfloat16 holds will do
        words = scales.astype(np.float32).view(np.uint32) & 0xFFFF0000
        scales = words.view(np.float32).astype(np.float64)
    layer = replace(layer, scales=scales)
    linear = load(layer, kernel=arch)
    x = normal(130, 512, "float16", seed=3)
    # Also without the rows of the large scales: what is left must not have been lost beside them.
    quiet = x.clone()
    quiet[:, torch.from_numpy(layer.groups % 2 == 0).to(DEVICE)] = 0
    for rows, m in itertools.product((x, quiet), (1, 16, 17, 130)):
        out = torch.empty((m, 70), device=DEVICE)
        linear(rows[:m], out=out)
        assert bool(torch.isfinite(out).all())
        check_each_column(out, layer, rows[:m], f"m {m}")


@each_kernel
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bfloat16_scales_that_float16_holds(
    bits: int, group_size: int, symmetric: bool, arch: str
) -> None:
    """Their type is a matter of the file alone: outputs have the same bits."""
    layer = make_layer(
        200, 576, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="BF16", seed=14
    )
    sizes = 2.0 ** -(np.arange(len(layer.scales)) % 8)  # down to 2^-16
    scales = np.where(layer.scales == TINY_SCALE, 2.0**-5, layer.scales) * sizes[:, None]
    layer = replace(layer, scales=scales)
    linear = load(layer, kernel=arch)
    same = load(replace(layer, scale_dtype="F16"), kernel=arch)
    for dtype, m in itertools.product(TYPES, (1, 8, 16, 24, 33, 130)):
        x = normal(m, 576, dtype, seed=m)
        y = linear(x)
        assert torch.equal(y, same(x)), (dtype, m)
        check_each_column(y, layer, x, f"{dtype}, m {m}")


def test_large_scales_alone(tmp_path: Path) -> None:
    """One group of each size: 1e30 beside 1e-35 with nothing but zeros on the large rows."""
    layer = make_layer(64, 256, symmetric=True, scale_dtype="F32", seed=13)
    scales = layer.scales * np.array([[1e30], [1e-35]])
    layer = replace(layer, scales=scales.astype(np.float32).astype(np.float64))
    linear = marlinq.open(write_checkpoint(tmp_path, {"proj": layer})).linear("proj", device=DEVICE)
    x = normal(64, 256, "bfloat16", seed=4)
    x[:, :128] = 0
    for m in (1, 16, 64):
        out = torch.empty((m, 64), device=DEVICE)
        linear(x[:m], out=out)
        check_each_column(out, layer, x[:m], f"m {m}")
        assert torch.equal(linear(x[:m]), out.bfloat16())  # the other half of its exponents


@pytest.mark.parametrize("dtype", TYPES)
def test_fused_modules(dtype: str, tmp_path: Path) -> None:
    """Each with an order, a type of scales and a bias of its own, at widths off every tile."""
    layers = [
        make_layer(64, 384, symmetric=False, seed=1),
        make_layer(31, 384, symmetric=True, act_order=True, bias=True, scale_dtype="F32", seed=2),
        make_layer(96, 384, symmetric=False, act_order=True, scale_dtype="BF16", seed=3),
        unbalanced(make_layer(33, 384, symmetric=False, bias=True, bias_dtype="F32", seed=4), 5),
        make_layer(80, 384, symmetric=True, scale_dtype="BF16", seed=6),
    ]
    names = [f"part{i}" for i in range(len(layers))]
    checkpoint = marlinq.open(write_checkpoint(tmp_path, dict(zip(names, layers, strict=True))))
    linear = checkpoint.linear(names, device=DEVICE)
    assert linear.describe()["fused"] == [64, 31, 96, 33, 80]
    x = normal(130, 384, dtype, seed=7)
    references = [reference(layer, x) for layer in layers]
    for m in (1, 16, 17, 64, 130):
        store, out = guarded(m, 304, x.dtype)
        linear(x[:m], out=out)
        first = 0
        for layer, expected in zip(layers, references, strict=True):
            expected.check(out[:, first : first + layer.n], f"columns from {first}")
            first += layer.n
        assert untouched(store, out)


@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size"),
    [
        (4096, 1024, 4, 128),
        (6144, 4096, 4, 512),
        (1600, 4160, 4, 64),
        (4096, 1024, 4, 32),
        (1600, 2112, 8, 32),
        (320, 8192, 8, -1),
        (2048, 3136, 8, 64),
    ],
)
def test_every_number_of_rows(n: int, k: int, bits: int, group_size: int) -> None:
    """Each kernel, with K whole, shared by blocks and cut, and groups of many stages."""
    layer = DeviceLayer(n, k, bits=bits, group_size=group_size, bias=True, seed=n + bits)
    linear = layer.load()
    rows = [*range(1, 36), 48, 63, 64, 65, 96, 127, 128, 129, 192, 250, 300, 512, 700]
    for dtype in TYPES:
        x = normal(max(rows), k, dtype, seed=k)
        expected = reference(layer, x)
        for m in rows:
            store, out = guarded(m, n, x.dtype)
            linear(x[:m], out=out)
            expected.check(out, f"m {m}")
            assert torch.equal(out, linear(x[:m])), m
            assert untouched(store, out), m


def test_the_same_as_the_cpu_backend() -> None:
    layer = make_layer(96, 320, bits=8, symmetric=False, act_order=True, bias=True, seed=10)
    x = normal(9, 320, "float16")
    device = host(load(layer)(x, out=torch.empty((9, 96), device=DEVICE)))
    cpu = load(layer, device="cpu", compute="float32")(host(x))
    assert np.linalg.norm(device - cpu) <= BOUNDS["float16"] * np.linalg.norm(cpu)
    assert_close(cpu, layer.expected(host(x)), 2e-6, "cpu")


def test_description() -> None:
    layer = DeviceLayer(96, 320, group_size=64, act_order=True, bias=True, seed=1)
    for invariant in (False, True):
        told = layer.load(batch_invariant=invariant).describe()
        assert told["backend"] == "cuda"
        assert told["device"] == DEVICE
        assert told["kernel"] == told["arch"] == KERNELS[0]
        assert told["compute"] == "float16 or bfloat16"
        assert told["batch_invariant"] is invariant
        for m in (1, 16, 64, 512):
            assert f"m {m}: " in told["schedule"]
        assert (told["k"], told["n"], told["bits"], told["group_size"]) == (320, 96, 4, 64)
        assert told["k_padded"] >= 320
        assert told["n_padded"] >= 96
        assert told["packed_bytes"] >= 320 * 96 // 2
        assert told["act_order"]
        assert told["bias"]
    assert f"cuda:0 {KERNELS[0]} float16 or bfloat16" in repr(layer.load())


def test_info() -> None:
    backends = {backend["name"]: backend for backend in marlinq.info()["backends"]}
    cuda = backends["cuda"]
    assert cuda["devices"] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert torch.cuda.get_device_name(0) in cuda["hardware"]
    assert [kernel["chosen"] for kernel in cuda["kernels"]].count(True) == 1
    assert marlinq.info()["build"].startswith("with the CUDA backend: ")


def test_verify_and_bench(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(DATA / "llama2-w4-g128-actorder")
    assert main(["verify", checkpoint, "--device", "cuda", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["failed"] == 0
    assert {module["backend"] for module in verified["modules"]} == {"cuda"}
    assert {module["compute"] for module in verified["modules"]} == {"float16"}
    short = ["--seconds", "0.01", "--rows", "1,17", "--device", "cuda", "--json", "--hot"]
    assert main(["bench", "--shapes", "256x512", *short]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["device"] == DEVICE
    assert [row["m"] for row in timed["results"]] == [1, 17]
    for row in timed["results"]:
        assert (row["device"], row["compute"]) == (DEVICE, "float16")
        assert row["seconds"] > 0
        assert row["numpy_seconds"] is None
    assert main(["bench", checkpoint, *short]) == 0
