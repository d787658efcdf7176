"""Every format of a GPTQ layer through `load_gptq`, against float64 by the definition."""

import warnings
from dataclasses import replace
from itertools import product

import marlinq
import numpy as np
import pytest
from gptq_writer import Layer, make_layer, pack_zeros, with_zeros
from marlinq.errors import InvalidArgumentError, MarlinqWarning, UnsupportedError
from support import LINEAR_BOUND, assert_close, normal, tolerance


def check(
    layer: Layer, layout: str = "gptq", m: int = 5, *, kernel: str | None = None, **options: bool
) -> marlinq.Linear:
    """Loads a layer, compares a product and returns the loaded one."""
    loaded = marlinq.load_gptq(
        **layer.arrays(layout, **options),
        bits=layer.bits,
        group_size=layer.group_size,
        k=layer.k,
        checkpoint_format=layout,
        compute="float32",
        kernel=kernel,
    )
    x = normal((m, layer.k), seed=m)
    what = f"n {layer.n}, k {layer.k}, {layer.bits} bits, group {layer.group_size}, {layout}, m {m}"
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, what)
    return loaded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_sizes(bits: int, group_size: int, symmetric: bool, kernel: str) -> None:
    layer = make_layer(
        96, 1024, bits=bits, group_size=group_size, symmetric=symmetric, seed=group_size + 1
    )
    loaded = check(layer, kernel=kernel)
    assert loaded.describe()["kernel"] == kernel
    assert loaded.describe()["symmetric"] is symmetric


@pytest.mark.parametrize(
    ("k", "group_size"),
    [(1, 128), (7, 2), (96, 40), (96, 1000), (100, 128), (320, 128), (288, 100), (1408, 1024)],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_short_last_group(k: int, group_size: int, bits: int, kernel: str) -> None:
    check(make_layer(64, k, bits=bits, group_size=group_size, symmetric=False), kernel=kernel)


@pytest.mark.parametrize(("k", "group_size"), [(32, 16), (96, 40), (320, 128), (1408, 1024)])
def test_short_last_group_of_three_bits(k: int, group_size: int, kernel: str) -> None:
    check(make_layer(64, k, bits=3, group_size=group_size, symmetric=False), kernel=kernel)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_every_code_with_every_zero_point(bits: int, layout: str, kernel: str) -> None:
    """Bit-exact: scale 1 and one row of x at a time leave single integers."""
    count = 1 << bits
    codes = np.arange(count, dtype=np.uint8)
    # Row k holds code k % count, column n has zero point n: the zeros of v1 borrow in every word.
    k = max(count, 32)
    layer = Layer(
        codes=np.repeat(np.arange(k) % count, count).reshape(k, count).astype(np.uint8),
        zeros=codes[None, :],
        scales=np.ones((1, count)),
        groups=np.zeros(k, np.int64),
        bits=bits,
        group_size=-1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarlinqWarning)  # ascending zeros look like the old writer
        loaded = marlinq.load_gptq(
            **layer.arrays(layout),
            bits=bits,
            group_size=-1,
            checkpoint_format=layout,
            compute="float32",
            kernel=kernel,
        )
    expected = codes[:, None].astype(np.float32) - codes[None, :].astype(np.float32)
    np.testing.assert_array_equal(loaded(np.eye(k, dtype=np.float32))[:count], expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_borrowed_zeros_of_random_layers(bits: int) -> None:
    layer = make_layer(64, 256, bits=bits, group_size=32, symmetric=False, seed=bits)
    zeros = layer.zeros * (np.random.default_rng(bits).random(layer.zeros.shape) < 0.5)
    check(with_zeros(layer, zeros), "gptq")


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_checkpoint_formats(layout: str, bits: int) -> None:
    layer = make_layer(96, 128, bits=bits, group_size=64, symmetric=False)
    if layout == "gptq_p" and bits == 3:
        with pytest.raises(
            UnsupportedError, match=r"gptq_p \(planar\) at 3 bits, expected 2, 4 or 8 bits"
        ):
            check(layer, layout)
        return
    loaded = check(layer, layout)
    assert loaded.describe()["zero_points"] == ("v1" if layout == "gptq" else "v2")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_auto_sees_the_convention_of_symmetric_zeros(bits: int, written: str) -> None:
    layer = make_layer(96, 128, bits=bits)
    loaded = marlinq.load_gptq(**layer.arrays(written), bits=bits)
    assert loaded.describe()["symmetric"]
    assert loaded.describe()["zero_points"] == ("v1" if written == "gptq" else "v2")
    x = normal((3, 128), seed=1)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, f"{bits} bits, {written}")


def test_auto_takes_asymmetric_zeros_for_v1() -> None:
    layer = make_layer(96, 128, symmetric=False)
    loaded = marlinq.load_gptq(**layer.arrays("gptq"))
    assert loaded.describe()["zero_points"] == "v1"
    x = normal((3, 128), seed=2)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, "n 96, k 128")


@pytest.mark.parametrize("forced", ["gptq", "gptq_v2"])
def test_a_forced_convention_is_not_second_guessed(forced: str) -> None:
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[forced]
    layer = make_layer(96, 128)
    loaded = marlinq.load_gptq(**layer.arrays(other), checkpoint_format=forced)
    shifted = with_zeros(layer, layer.zeros + np.uint8(1 if forced == "gptq" else 255))
    x = normal((3, 128), seed=3)
    assert_close(loaded(x), shifted.expected(x), LINEAR_BOUND, f"{other} forced to {forced}")
    assert not loaded.describe()["symmetric"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_absent_zeros_mean_the_middle(bits: int, kernel: str) -> None:
    layer = make_layer(96, 128, bits=bits)
    assert check(layer, "auto", kernel=kernel, qzeros=False).describe()["symmetric"]


def _layer_of_the_old_writer() -> Layer:
    layer = make_layer(32, 128, symmetric=False)
    zeros = layer.zeros.copy()
    zeros[0, 3] = 0  # of 8 fields in the word: 4 to 7 are lost
    return with_zeros(layer, zeros)


def test_old_writer_warns_and_loads_what_is_left() -> None:
    layer = _layer_of_the_old_writer()
    arrays = layer.arrays()
    arrays["qzeros"] = pack_zeros(layer.zeros, 4, "gptq_old")
    with pytest.warns(MarlinqWarning, match=r"qzeros: 1 of 4 words .* old writer"):
        loaded = marlinq.load_gptq(**arrays)
    assert len(loaded.describe()["warnings"]) == 1
    # With the repeated 1 added, 0xFFFF.... reads as 0 and then a 1 in every lost field.
    read = layer.zeros.copy()
    read[0, 4:8] = 1
    x = normal((9, 128), seed=4)
    assert_close(loaded(x), with_zeros(layer, read).expected(x), LINEAR_BOUND, "n 32, k 128")


def test_a_borrow_is_not_taken_for_the_old_writer() -> None:
    layer = _layer_of_the_old_writer()
    loaded = marlinq.load_gptq(**layer.arrays("gptq"))  # a warning would be an error
    assert loaded.describe()["warnings"] == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_act_order(bits: int, symmetric: bool, group_size: int, kernel: str) -> None:
    layer = make_layer(
        96, 320, bits=bits, group_size=group_size, symmetric=symmetric, act_order=True
    )
    assert check(layer, kernel=kernel).describe()["act_order"]


def test_unbalanced_groups(kernel: str) -> None:
    layer = make_layer(96, 256, group_size=32, symmetric=False)
    groups = np.random.default_rng(7).choice([0, 1, 1, 1, 6], 256)
    assert check(replace(layer, groups=groups), kernel=kernel).describe()["act_order"]


def test_negative_groups_count_from_the_end() -> None:
    layer = make_layer(96, 256, group_size=64, symmetric=False, act_order=True)
    arrays = layer.arrays()
    arrays["g_idx"] = np.where(layer.groups % 2, layer.groups - 4, layer.groups).astype(np.int32)
    assert arrays["g_idx"].min() < 0
    loaded = marlinq.load_gptq(**arrays, group_size=64)
    x = normal((5, 256), seed=5)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, "n 96, k 256, group 64")


def test_trivial_g_idx_is_no_act_order() -> None:
    layer = make_layer(96, 256, group_size=64, symmetric=False)
    stored = check(layer)
    assert not stored.describe()["act_order"]
    absent = check(layer, g_idx=False)
    x = normal((5, 256), seed=6)
    np.testing.assert_array_equal(stored(x), absent(x))


@pytest.mark.parametrize("bias_dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_scale_and_bias_types(scale_dtype: str, bias_dtype: str, kernel: str) -> None:
    layer = make_layer(
        96, 256, symmetric=False, bias=True, scale_dtype=scale_dtype, bias_dtype=bias_dtype
    )
    description = check(layer, kernel=kernel).describe()
    assert description["bias"]
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    assert description["scale_dtype"] == names[scale_dtype]


@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_scales_keep_their_precision(scale_dtype: str, kernel: str) -> None:
    """Bit-exact: the identity leaves single products with the scale, each rounded once."""
    layer = make_layer(64, 32, group_size=16, scale_dtype=scale_dtype, seed=3)
    loaded = marlinq.load_gptq(**layer.arrays(), group_size=16, compute="float32", kernel=kernel)
    exact = layer.dense().T.astype(np.float32)
    np.testing.assert_array_equal(loaded(np.eye(32, dtype=np.float32)), exact)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_k_that_no_tensor_tells(bits: int) -> None:
    layer = make_layer(64, 61, bits=bits, group_size=20, symmetric=False)
    loaded = check(layer, g_idx=False)
    assert loaded.in_features == 61
    padded = marlinq.load_gptq(
        **make_layer(64, 64, bits=bits, group_size=-1).arrays(g_idx=False), bits=bits, group_size=-1
    )
    assert padded.in_features == 64


@pytest.mark.parametrize("n", [1, 3, 7, 17, 33, 60, 250])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_any_number_of_columns(n: int, bits: int, kernel: str) -> None:
    check(
        make_layer(n, 96, bits=bits, group_size=32, symmetric=False, act_order=True, bias=True),
        kernel=kernel,
    )


SIZES = [1, 7, 32, 60, 64, 96, 192, 320, 416, 576, 704, 1408]


@pytest.mark.parametrize(("n", "k"), list(product(SIZES, SIZES)))
def test_sizes(n: int, k: int) -> None:
    """The default kernel; the C++ tests run every size on every kernel."""
    seed = n * 2000 + k
    layer = make_layer(n, k, symmetric=seed % 2 == 0, act_order=seed % 3 == 0, bias=True, seed=seed)
    loaded = marlinq.load_gptq(**layer.arrays())
    for m in (1, 17):
        x = normal((m, k), seed)
        assert_close(
            loaded(x), layer.expected(x), LINEAR_BOUND, f"n {n}, k {k}, m {m}, seed {seed}"
        )


@pytest.mark.parametrize("compute", ["float32", "int16", "bfloat16", "int8"])
def test_a_compute_type_keeps_its_bound(compute: str, kernel: str) -> None:
    layer = make_layer(320, 1024, symmetric=False, seed=6)
    loaded = marlinq.load_gptq(**layer.arrays(), compute=compute, kernel=kernel)
    assert loaded.describe()["compute"] == compute
    cpu = next(b for b in marlinq.info()["backends"] if b["name"] == "cpu")
    assert compute in cpu["compute"]
    for m in (1, 3, 40):
        x = normal((m, 1024), seed=m)
        assert_close(loaded(x), layer.expected(x), tolerance("linear", compute), f"m {m}")


def test_auto_compute_is_one_that_info_lists() -> None:
    loaded = marlinq.load_gptq(**make_layer(64, 128).arrays())
    cpu = next(b for b in marlinq.info()["backends"] if b["name"] == "cpu")
    assert loaded.describe()["compute"] in cpu["compute"]
    chosen = [kernel["name"] for kernel in cpu["kernels"] if kernel["chosen"]]
    assert [loaded.describe()["kernel"]] == chosen


def test_the_tensors_are_not_needed_after_the_load() -> None:
    layer = make_layer(96, 256, symmetric=False, act_order=True, bias=True)
    arrays = {name: array.copy() for name, array in layer.arrays().items()}
    loaded = marlinq.load_gptq(**arrays)
    for array in arrays.values():
        array.view(np.uint8)[...] = 255
    x = normal((5, 256), seed=8)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, "n 96, k 256")


def test_tensors_at_odd_addresses_and_read_only() -> None:
    layer = make_layer(96, 256, symmetric=False)
    arrays = {}
    for name, array in layer.arrays().items():
        raw = np.zeros(array.nbytes + 1, np.uint8)
        raw[1:] = array.view(np.uint8).reshape(-1)
        arrays[name] = raw[1:].view(array.dtype).reshape(array.shape)
        arrays[name].flags.writeable = False
        assert arrays[name].ctypes.data % 2
    x = normal((5, 256), seed=9)
    loaded = marlinq.load_gptq(**arrays)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, "n 96, k 256")


def test_unsigned_words_are_taken() -> None:
    layer = make_layer(96, 256, symmetric=False)
    arrays = layer.arrays()
    arrays |= {name: arrays[name].view(np.uint32) for name in ("qweight", "qzeros")}
    x = normal((5, 256), seed=9)
    assert_close(marlinq.load_gptq(**arrays)(x), layer.expected(x), LINEAR_BOUND, "n 96, k 256")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_packed_weight_is_hardly_larger_than_the_checkpoint(bits: int, act_order: bool) -> None:
    for n, k in ((256, 256), (1408, 576), (384, 1536)):
        layer = make_layer(n, k, bits=bits, symmetric=False, act_order=act_order)
        arrays = layer.arrays()
        description = marlinq.load_gptq(**arrays, bits=bits).describe()
        assert description["checkpoint_bytes"] == sum(array.nbytes for array in arrays.values())
        assert description["packed_bytes"] <= 1.1 * description["checkpoint_bytes"]


def test_describe() -> None:
    layer = make_layer(60, 100, group_size=32, symmetric=False, act_order=True, bias=True)
    loaded = marlinq.load_gptq(**layer.arrays(), group_size=32, batch_invariant=True)
    description = loaded.describe()
    facts = {
        "backend": "cpu",
        "device": "cpu",
        "bits": 4,
        "group_size": 32,
        "k": 100,
        "n": 60,
        "num_experts": 1,
        "fused": [60],
        "symmetric": False,
        "act_order": True,
        "bias": True,
        "batch_invariant": True,
        "zero_points": "v1",
        "scale_dtype": "float16",
        "warnings": [],
    }
    assert {name: description[name] for name in facts} == facts
    assert description["n_padded"] >= 60
    assert description["k_padded"] >= 100
    assert loaded.device == "cpu"
    assert (loaded.in_features, loaded.out_features) == (100, 60)
    for part in ("100 -> 60", "4 bits", "group 32", "act_order", "bias", description["kernel"]):
        assert part in repr(loaded)


def test_unknown_kernel_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match="kernel") as raised:
        marlinq.load_gptq(**make_layer(64, 128).arrays(), kernel="sse9")
    assert "sse9" in str(raised.value)
    for backend in marlinq.info()["backends"]:
        for kernel in backend["kernels"]:
            assert (kernel["name"] in str(raised.value)) == (backend["name"] == "cpu")
