"""Random layers, damages and configurations: right results, or the right refusal."""

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import (
    Array,
    Layer,
    Tensor,
    describe_tensors,
    encode_header,
    make_layer,
    named,
    stack_arrays,
    with_zeros,
    write_checkpoint,
)
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from marlinq.errors import (
    InvalidArgumentError,
    InvalidFileError,
    MarlinqWarning,
    UnsupportedError,
)
from support import EXACT_BOUND, LINEAR_BOUND, assert_close, normal, usable_kernels

settings.register_profile(
    "marlinq",
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("marlinq")

FLOATS = ("F16", "BF16", "F32")
sizes = st.one_of(st.integers(1, 40), st.integers(41, 300))


@st.composite
def layers(draw: st.DrawFn, n: int | None = None, k: int | None = None) -> Layer:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    k = draw(sizes) if k is None else k
    layer = make_layer(
        draw(sizes) if n is None else n,
        k,
        bits=bits,
        group_size=draw(st.one_of(st.sampled_from([-1, 16, 32, 64, 128]), st.integers(1, 350))),
        symmetric=draw(st.booleans()),
        act_order=draw(st.booleans()),
        bias=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(FLOATS)),
        bias_dtype=draw(st.sampled_from(FLOATS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    if draw(st.booleans()):  # any zeros at all, borrows included
        random = np.random.default_rng(layer.n)
        layer = with_zeros(layer, random.integers(0, 1 << bits, layer.zeros.shape))
    if draw(st.booleans()):  # unbalanced groups
        random = np.random.default_rng(layer.k)
        layer = replace(layer, groups=random.integers(0, len(layer.scales), k))
    return layer


def describe(layer: Layer) -> str:
    return (
        f"n {layer.n}, k {layer.k}, {layer.bits} bits, group {layer.group_size}, "
        f"{layer.scale_dtype} scales, bias {layer.bias is not None}"
    )


def load(layer: Layer, layout: str, arrays: dict[str, Any], **options: Any) -> marlinq.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarlinqWarning)  # random zeros may look like the old writer
        return marlinq.load_gptq(
            **arrays,
            **{
                "bits": layer.bits,
                "group_size": layer.group_size,
                "k": layer.k,
                "checkpoint_format": layout,
                "compute": "float32",
            }
            | options,
        )


@given(
    layer=layers(),
    m=st.integers(0, 70),
    layout=st.sampled_from(["gptq", "gptq_v2"]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    threads=st.integers(1, 3),
    kernel=st.sampled_from(usable_kernels()),
    seed=st.integers(0, 1000),
)
def test_any_layer(
    layer: Layer, m: int, layout: str, dtype: Any, threads: int, kernel: str, seed: int
) -> None:
    note(describe(layer))
    linear = load(layer, layout, layer.arrays(layout), kernel=kernel)
    x = normal((m, layer.k), seed, dtype)
    out = np.empty((m, layer.n), np.float32)
    linear(x, out=out, context=marlinq.Context("cpu", threads))
    assert_close(out, layer.expected(x), EXACT_BOUND, f"{describe(layer)}, m {m}, seed {seed}")


@given(count=st.integers(1, 6), n=sizes, k=sizes, m=st.integers(1, 20), data=st.data())
def test_any_stack(count: int, n: int, k: int, m: int, data: st.DataObject) -> None:
    first = data.draw(layers(n, k))
    experts = [
        make_layer(
            n,
            k,
            bits=first.bits,
            group_size=first.group_size,
            symmetric=data.draw(st.booleans()),
            act_order=data.draw(st.booleans()),
            bias=first.bias is not None,
            scale_dtype=first.scale_dtype,
            seed=index,
        )
        for index in range(count)
    ]
    stack = marlinq.load_gptq_stacked(
        **stack_arrays(experts, "gptq_v2"),
        bits=first.bits,
        group_size=first.group_size,
        k=k,
        checkpoint_format="gptq_v2",
    )
    x = normal((m, k), seed=m)
    for index, layer in enumerate(experts):
        what = f"expert {index} of {count}, {describe(layer)}, m {m}"
        assert_close(stack[index](x), layer.expected(x), LINEAR_BOUND, what)


def _shrink(array: Array, axis: int) -> Array:
    return np.ascontiguousarray(np.delete(array, -1, axis))


def _grow(array: Array, axis: int) -> Array:
    return np.ascontiguousarray(np.concatenate([array, array.take([0], axis)], axis))


_WRONG_TYPES = [np.int8, np.int16, np.float64, np.complex64, np.bool_, np.uint64]


@given(layer=layers(), data=st.data())
def test_any_damage_is_refused_by_name(layer: Layer, data: st.DataObject) -> None:
    """One tensor gets a wrong shape, rank, dtype or value; the message names it."""
    arrays = layer.arrays("gptq_v2")
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays[name]
    damage = data.draw(st.sampled_from(["shrink", "grow", "rank", "dtype", "value", "empty"]))
    event(damage)
    axis = data.draw(st.integers(0, array.ndim - 1))
    expected = f"{name}: "
    if damage in ("shrink", "grow"):
        arrays[name] = (_shrink if damage == "shrink" else _grow)(array, axis)
        if name == "qweight" and axis == 1:
            expected = "scales: shape|n = 0"  # N is read from qweight
    elif damage == "rank":
        arrays[name] = array[None]
    elif damage == "dtype":
        wrong = data.draw(st.sampled_from(_WRONG_TYPES))
        arrays[name] = np.zeros(array.shape, wrong)
    elif damage == "empty":
        arrays[name] = np.zeros((0,) * array.ndim, array.dtype)
    elif name in ("scales", "bias"):
        place = data.draw(st.integers(0, array.size - 1))
        arrays[name] = array.copy()
        arrays[name].reshape(-1)[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    elif name == "g_idx":
        count = len(layer.scales)
        arrays[name] = array.copy()
        arrays[name][data.draw(st.integers(0, layer.k - 1))] = data.draw(
            st.one_of(st.integers(count, 2**31 - 1), st.integers(-(2**31), -count - 1))
        )
    else:
        assume(False)  # every word is a weight, or a zero point
    with pytest.raises(InvalidArgumentError, match=expected) as raised:
        load(layer, "gptq_v2", arrays)
    assert "expected" in str(raised.value)


@given(layer=layers(), data=st.data())
def test_any_wrong_option_is_refused(layer: Layer, data: st.DataObject) -> None:
    arrays = layer.arrays("gptq_v2")
    option = data.draw(st.sampled_from(["bits", "group_size", "k"]))
    if option == "bits":
        value = data.draw(st.integers(-5, 40).filter(lambda bits: bits != layer.bits))
    elif option == "group_size":
        value = data.draw(st.integers(-5, 400))
        rows = layer.k if value == -1 else value
        assume(rows < 1 or -(-layer.k // rows) != len(layer.scales))
    else:
        value = data.draw(st.integers(-5, 400))
        assume(value not in (layer.k, 0))
    with pytest.raises(InvalidArgumentError, match="expected"):
        load(layer, "gptq_v2", arrays, **{option: value})


_json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from(["gptq", "gptq_v2", "gptq_p", "awq", "marlin", "int32", "auto-round"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
_keys = [
    "quant_method",
    "method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "packing_format",
    "pack_dtype",
    "lm_head",
    "dynamic",
    "meta",
    "modules_in_block_to_quantize",
    "nonsense",
]


@given(config=st.dictionaries(st.sampled_from(_keys), _json_values, max_size=5), data=st.data())
def test_any_configuration(config: dict[str, Any], data: st.DataObject) -> None:
    """The tensors tell all of a symmetric layer: it loads right, or a value is refused."""
    layer = make_layer(32, 128, group_size=64, act_order=data.draw(st.booleans()), seed=1)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), {"proj": layer}, quantize_config=config)
        try:
            checkpoint = marlinq.open(directory)
        except InvalidFileError as error:
            message = str(error)
            event("refused at open")
            assert "quantize_config.json" in message
            return
        json.dumps([info.as_dict() for info in checkpoint.modules()])
        try:
            linear = checkpoint.linear("proj")
        except UnsupportedError as error:
            message = str(error)
            event("refused at load")
            assert message.startswith("proj: ")
            return
        event("loaded")
        # An asymmetric label with constant zeros follows checkpoint_format, as the rule says.
        assume(config.get("sym") is not False)
        x = normal((9, 128), seed=2)
        assert_close(linear(x), layer.expected(x), LINEAR_BOUND, config)


@given(data=st.data())
@settings(max_examples=300)
def test_any_flipped_bytes_of_a_header(data: st.DataObject) -> None:
    """Whatever a header says: a clean refusal, or tensors that lie inside the file."""
    layer = make_layer(8, 32, group_size=32)
    with tempfile.TemporaryDirectory() as directory:
        file = write_checkpoint(Path(directory), {"p": layer}) / "model.safetensors"
        content = bytearray(file.read_bytes())
        length = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, length - 1))
            content[place] = data.draw(
                st.one_of(st.sampled_from(list(b'0123456789"{}[],:FI')), st.integers(0, 255))
            )
        file.write_bytes(content)
        try:
            checkpoint = marlinq.open(file)
        except InvalidFileError as error:
            message = str(error)
            event("refused at open")
            assert str(file) in message
            return
        event("opened")
        for info in checkpoint.modules():
            try:
                x = np.ones((1, info.k or 1), np.float32)
                checkpoint.linear(info.name)(x)
            except (InvalidArgumentError, InvalidFileError, UnsupportedError) as error:
                message = str(error)
                assert info.name in message
                assert info.reason == message


@given(
    shape=st.lists(st.integers(0, 2**63), max_size=4),
    dtype=st.sampled_from(["F16", "I32", "F32", "F64", "U8", "BOOL", "F8_E4M3"]),
    name=st.sampled_from(["qweight", "scales", "qzeros", "g_idx", "bias"]),
)
def test_any_shape_in_a_header(shape: list[int], dtype: str, name: str) -> None:
    layer = make_layer(8, 32, group_size=32, bias=True)
    header, body = describe_tensors(named("p", layer.tensors()))
    true = header[f"p.{name}"]
    header[f"p.{name}"] = true | {"shape": shape, "dtype": dtype}
    assume((shape, dtype) != (true["shape"], true["dtype"]))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.safetensors"
        file.write_bytes(encode_header(header) + body)
        with pytest.raises((InvalidFileError, InvalidArgumentError), match=rf"p\.{name}|model"):
            marlinq.open(file).linear("p")


@given(
    tensor=st.sampled_from(["qweight", "scales", "qzeros", "g_idx"]),
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
)
def test_any_shape_of_a_tensor(tensor: str, rows: int, columns: int) -> None:
    """A stored tensor of another shape loads only where it makes a sound module."""
    layer = make_layer(32, 64, group_size=32, symmetric=False)
    tensors = dict(layer.tensors())
    old = tensors[tensor]
    shape = (rows,) if old.array.ndim == 1 else (rows, columns)
    assume(shape != old.array.shape)
    tensors[tensor] = Tensor(old.dtype, np.ones(shape, old.array.dtype))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = marlinq.open(write_checkpoint(Path(directory), {"p": tensors}))
        try:
            linear = checkpoint.linear("p")
        except (InvalidFileError, InvalidArgumentError, UnsupportedError) as error:
            message = str(error)
            event("refused")
            assert message.startswith("p")
            return
        event("sound")
        x = normal((9, linear.in_features), seed=3)
        y = checkpoint.reference("p").product(x)
        error, factor = y.error(linear(x))
        assert error <= LINEAR_BOUND * factor, f"{tensor} {shape}"
