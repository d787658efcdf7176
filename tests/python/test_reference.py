"""marlinq.reference, which `marlinq verify` trusts, against the tests' own writer."""

import subprocess
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gptq_writer import Layer, make_layer, pack_fields, pack_zeros, with_zeros
from marlinq.reference import (
    BOUNDS,
    Product,
    Weight,
    decode_zeros,
    find_convention,
    unpack,
    widen,
)
from support import normal, run_python, tolerance


def as_weight(layer: Layer, layout: str = "gptq", **options: Any) -> Weight:
    arrays = {name: tensor.array for name, tensor in layer.tensors(layout).items()}
    return Weight(**arrays, bits=layer.bits, group_size=layer.group_size, k=layer.k, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantize(bits: int, layout: str, scale_dtype: str, act_order: bool) -> None:
    layer = make_layer(
        300,
        100,
        bits=bits,
        group_size=32,
        symmetric=False,
        act_order=act_order,
        bias=True,
        scale_dtype=scale_dtype,
    )
    weight = as_weight(layer, layout, zero_points="v1" if layout == "gptq" else "v2")
    np.testing.assert_array_equal(weight.dequantize(), layer.dense())
    x = normal((9, 100), seed=bits)
    product, expected = weight.product(x), layer.expected(x)
    # Sums of 100 float64 products in another order.
    np.testing.assert_allclose(product.y, expected.y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product.magnitude, expected.magnitude, rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_unpack(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, (count, 5), np.uint8)
    np.testing.assert_array_equal(unpack(pack_fields(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_every_pair_of_neighbouring_zero_points(bits: int, layout: str) -> None:
    count = 1 << bits
    zeros = np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1).reshape(-1, 2)
    zeros = np.tile(zeros, (1, 7)).astype(np.uint8)
    stored = pack_zeros(zeros, bits, layout)
    convention = "v1" if layout == "gptq" else "v2"
    np.testing.assert_array_equal(decode_zeros(stored, bits, 14, convention), zeros)


@pytest.mark.parametrize(
    ("zeros", "written", "labelled", "symmetry", "convention"),
    [
        (8, "gptq", "v2", "symmetric", "v1"),
        (8, "gptq_v2", "v1", "symmetric", "v2"),
        (8, "gptq", "v2", "unknown", "v1"),
        (8, "gptq_v2", "auto", "unknown", "v2"),
        (8, "gptq_v2", "v1", "asymmetric", "v1"),
        (8, "gptq", "v2", "asymmetric", "v2"),
        (9, "gptq", "auto", "unknown", "v2"),  # stored 8 everywhere: indistinguishable
        (3, "gptq", "auto", "symmetric", "v1"),
        (3, "gptq", "v2", "symmetric", "v2"),
    ],
)
def test_conventions(
    zeros: int, written: str, labelled: str, symmetry: str, convention: str
) -> None:
    stored = pack_zeros(np.full((2, 16), zeros, np.uint8), 4, written)
    assert find_convention(stored, 4, 16, labelled=labelled, symmetry=symmetry) == convention
    assert find_convention(None, 4, 16, labelled=labelled, symmetry=symmetry) == (
        "v1" if labelled == "auto" else labelled
    )


def test_absent_tensors_and_negative_groups() -> None:
    layer = make_layer(64, 96, group_size=32)
    tensors = {name: tensor.array for name, tensor in layer.tensors().items()}
    plain = Weight(tensors["qweight"], tensors["scales"], group_size=32)
    np.testing.assert_array_equal(plain.dequantize(), layer.dense())
    counted = Weight(tensors["qweight"], tensors["scales"], g_idx=layer.groups.astype(np.int32) - 3)
    np.testing.assert_array_equal(counted.dequantize(), layer.dense())
    assert (counted.in_features, counted.out_features) == (96, 64)


def test_it_notices_a_wrong_zero_point() -> None:
    """The bounds are far below the smallest error that a wrong decode makes."""
    layer = make_layer(64, 256, symmetric=False)
    x = normal((17, 256), seed=1)
    wrong = layer.zeros.copy()
    wrong[0, 5] ^= 1
    product = as_weight(layer, zero_points="v1").product(x)
    error, factor = product.error(with_zeros(layer, wrong).expected(x).y)
    assert error > 100 * factor * BOUNDS["float32"]


def test_errors_are_measured_as_documented() -> None:
    y = normal((4, 64), seed=2).astype(np.float64)
    product = Product(y, np.square(y) * 4)
    error, factor = product.error(y * 1.5)
    assert factor == 1
    assert error == pytest.approx(0.5)
    error, factor = product.error(y[:3] * 1.5)
    assert factor == tolerance("small_output", "factor")
    assert error == pytest.approx(0.25)
    broken = y.copy()
    broken[2, 3] = np.nan
    assert not np.isfinite(product.error(broken)[0])
    assert Product(np.zeros((1, 2)), np.zeros((1, 2))).error(np.zeros((1, 2)))[0] == 0


def test_bounds_are_those_of_the_tests() -> None:
    assert BOUNDS["float32"] == tolerance("linear", "float32")


def test_widen() -> None:
    values = normal(1000, seed=3)
    np.testing.assert_array_equal(widen(values), values.astype(np.float64))
    half = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(widen(half.view(np.uint16)), half.astype(np.float64))


def test_it_needs_nothing_of_the_core() -> None:
    """Its source imports numpy and the standard library alone."""
    script = (
        "import ast, importlib.util, sys\n"
        "path = importlib.util.find_spec('marlinq').submodule_search_locations[0]\n"
        "tree = ast.parse(open(path + '/reference.py').read())\n"
        "for node in ast.walk(tree):\n"
        "    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []\n"
        "    names += [node.module] if isinstance(node, ast.ImportFrom) else []\n"
        "    print(*names, sep='\\n', end='\\n' if names else '')\n"
    )
    finished = subprocess.run(run_python("-c", script), capture_output=True, text=True, check=True)
    assert set(finished.stdout.split()) == {"dataclasses", "typing", "numpy"}
