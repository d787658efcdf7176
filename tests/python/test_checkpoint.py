"""Checkpoints on disk: files, indices, configurations, and which of them is believed."""

import json
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import (
    Expected,
    Layer,
    Tensor,
    fuse,
    make_layer,
    named,
    round_to,
    with_zeros,
    write_checkpoint,
    write_safetensors,
)
from marlinq.errors import InvalidArgumentError, InvalidFileError, UnsupportedError
from support import DATA, LINEAR_BOUND, assert_close, copy_data, normal

Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def check(checkpoint: marlinq.Checkpoint, name: str, layer: Layer) -> marlinq.Linear:
    """Compares a module with the layer that was written, and with the reference."""
    loaded = checkpoint.linear(name)
    x = normal((5, layer.k), seed=1)
    assert_close(loaded(x), layer.expected(x), LINEAR_BOUND, name)
    np.testing.assert_array_equal(checkpoint.reference(name).dequantize(), layer.dense())
    info = checkpoint.module(name)
    assert info.supported, info.reason
    assert (info.bits, info.k, info.n) == (layer.bits, layer.k, layer.n)
    return loaded


def write_shards(directory: Path, shards: dict[str, dict[str, Tensor]], **index: Any) -> Path:
    """Shards and their index."""
    for file, tensors in shards.items():
        write_safetensors(directory / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return directory


LAYERS = {
    Q: make_layer(64, 256, symmetric=False, bias=True, seed=1),
    K: make_layer(32, 256, symmetric=False, bias=True, seed=2),
    V: make_layer(48, 256, symmetric=False, bias=True, seed=3),
}


def test_a_file_and_its_directory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LAYERS, quantize_config=GPTQ | {"sym": False})
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        checkpoint = marlinq.open(path)
        assert [info.name for info in checkpoint.modules()] == [K, Q, V]
        assert len(checkpoint) == 3
        assert Q in checkpoint
        assert "3 quantised modules" in repr(checkpoint)
        assert checkpoint.quantization.bits == 4
        for name, layer in LAYERS.items():
            check(checkpoint, name, layer)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "x.safetensors"])
def test_other_base_names(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, LAYERS, file=name)
    (tmp_path / "tokenizer.json").write_text("{}")
    check(marlinq.open(tmp_path), Q, LAYERS[Q])
    check(marlinq.open(tmp_path / name), Q, LAYERS[Q])


def _scattered() -> dict[str, dict[str, Tensor]]:
    """Every tensor of a module in another file."""
    files = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    shards: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for name, layer in LAYERS.items():
        for position, (tensor, content) in enumerate(named(name, layer.tensors()).items()):
            shards[files[position]][tensor] = content
    return shards


def test_tensors_of_a_module_in_different_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, _scattered())
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = marlinq.open(path)
        for name, layer in LAYERS.items():
            check(checkpoint, name, layer)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, _scattered())
    (tmp_path / "model.safetensors.index.json").unlink()
    for name, layer in LAYERS.items():
        check(marlinq.open(tmp_path), name, layer)


def test_an_index_of_another_name(tmp_path: Path) -> None:
    write_shards(tmp_path, _scattered())
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / "gptq_model-4bit.safetensors.index.json")
    check(marlinq.open(tmp_path), Q, LAYERS[Q])


def test_a_file_that_the_index_does_not_name_is_left_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, _scattered())
    other = make_layer(64, 256, seed=9)
    write_checkpoint(tmp_path, {Q: other, "more": other}, file="consolidated.safetensors")
    checkpoint = marlinq.open(tmp_path)
    check(checkpoint, Q, LAYERS[Q])
    assert "more" not in checkpoint


def test_a_g_idx_that_the_index_forgot_is_honoured(tmp_path: Path) -> None:
    layer = make_layer(64, 256, act_order=True, seed=4)
    write_shards(tmp_path, {"model-1.safetensors": named(Q, layer.tensors())})
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][f"{Q}.g_idx"]
    index.write_text(json.dumps(content))
    assert check(marlinq.open(tmp_path), Q, layer).describe()["act_order"]


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {Q: LAYERS[Q]}, file="a.safetensors")
    write_checkpoint(tmp_path, {Q: LAYERS[Q]}, file="b.safetensors")
    with pytest.raises(InvalidFileError, match=r"b\.safetensors: holds .* which a\.safetensors"):
        marlinq.open(tmp_path)
    check(marlinq.open(tmp_path / "a.safetensors"), Q, LAYERS[Q])


def test_no_configuration(tmp_path: Path) -> None:
    layers = {
        "a": make_layer(64, 256, seed=1),
        "b": make_layer(64, 256, group_size=32, symmetric=False, act_order=True, seed=2),
        "c": make_layer(64, 256, bits=8, group_size=-1, seed=3),
        "d": make_layer(64, 256, bits=2, group_size=64, seed=4),
        "e": make_layer(64, 256, bits=3, group_size=64, seed=5),
    }
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers))
    assert checkpoint.config == {}
    for name, layer in layers.items():
        check(checkpoint, name, layer)


@pytest.mark.parametrize("where", ["quantize_config", "config", "text_config", "both"])
def test_where_the_configuration_lies(tmp_path: Path, where: str) -> None:
    """Asymmetric v2 zeros: only the configuration tells their convention."""
    layer = make_layer(64, 256, symmetric=False, seed=5)
    right = GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}
    wrong = GPTQ | {"sym": False, "checkpoint_format": "gptq"}
    files: dict[str, dict[str, Any]] = {
        "quantize_config": {"quantize_config": right},
        "config": {"config": {"model_type": "llama", "quantization_config": right}},
        "text_config": {"config": {"text_config": {"quantization_config": right}}},
        "both": {"config": {"quantization_config": right}, "quantize_config": wrong},
    }
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, {Q: layer}, layout="gptq_v2", **files[where])
    )
    assert checkpoint.quantization.checkpoint_format == "gptq_v2"
    assert check(checkpoint, Q, layer).describe()["zero_points"] == "v2"


def test_the_second_configuration_fills_the_gaps(tmp_path: Path) -> None:
    layer = make_layer(64, 256, symmetric=False, seed=5)
    directory = write_checkpoint(
        tmp_path,
        {Q: layer},
        layout="gptq_v2",
        config={"quantization_config": {"quant_method": "gptq", "bits": 4}},
        quantize_config={"bits": 8, "format": "gptq_v2", "group_size": 128},
    )
    quantization = marlinq.open(directory).quantization
    assert (quantization.bits, quantization.group_size) == (4, 128)
    check(marlinq.open(directory), Q, layer)


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_both_keys_of_the_format(tmp_path: Path, key: str) -> None:
    layer = make_layer(64, 256, symmetric=False, seed=5)
    config = {"method": "GPTQ", "sym": False, key: "GPTQ_v2"}
    check(
        marlinq.open(
            write_checkpoint(tmp_path, {Q: layer}, layout="gptq_v2", quantize_config=config)
        ),
        Q,
        layer,
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("label", "written"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
@pytest.mark.parametrize("symmetric", [True, None])
def test_mislabelled_symmetric_files(
    tmp_path: Path, bits: int, label: str, written: str, symmetric: bool | None
) -> None:
    layer = make_layer(64, 256, bits=bits, seed=6)
    config = GPTQ | {"bits": bits, "checkpoint_format": label, "sym": symmetric}
    directory = write_checkpoint(tmp_path, {Q: layer}, layout=written, quantize_config=config)
    description = check(marlinq.open(directory), Q, layer).describe()
    assert description["zero_points"] == ("v1" if written == "gptq" else "v2")
    assert description["symmetric"]


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_constant_zeros_of_an_asymmetric_file_follow_the_label(tmp_path: Path, label: str) -> None:
    """All stored codes are 7, or all are 8, and `sym` is false: the label is believed."""
    stored = make_layer(64, 256, seed=6)
    for written in ("gptq", "gptq_v2"):
        config = GPTQ | {"checkpoint_format": label, "sym": False}
        directory = write_checkpoint(
            tmp_path / written, {Q: stored}, layout=written, quantize_config=config
        )
        shift = {("gptq", "gptq_v2"): 1, ("gptq_v2", "gptq"): -1}.get((label, written), 0)
        meant = with_zeros(stored, stored.zeros.astype(int) + shift)
        check(marlinq.open(directory), Q, meant)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_sym_flag_that_lies(tmp_path: Path, layout: str) -> None:
    layer = make_layer(64, 256, symmetric=False, seed=7)
    config = GPTQ | {"sym": True, "checkpoint_format": layout}
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, {Q: layer}, layout=layout, quantize_config=config)
    )
    assert not check(checkpoint, Q, layer).describe()["symmetric"]
    assert checkpoint.module(Q).symmetric is False


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_act_order_is_seen_in_the_tensor(tmp_path: Path, flag: bool, act_order: bool) -> None:
    layer = make_layer(64, 256, act_order=act_order, seed=8)
    config = GPTQ | {"desc_act": flag}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {Q: layer}, quantize_config=config))
    assert check(checkpoint, Q, layer).describe()["act_order"] is act_order
    assert checkpoint.module(Q).act_order is act_order


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planar_files_at_two_four_and_eight_bits(tmp_path: Path, bits: int) -> None:
    layer = make_layer(64, 256, bits=bits, symmetric=False, seed=9)
    config = GPTQ | {"bits": bits, "sym": False, "checkpoint_format": "gptq_p"}
    directory = write_checkpoint(tmp_path, {Q: layer}, layout="gptq_p", quantize_config=config)
    check(marlinq.open(directory), Q, layer)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planar_files_of_other_bits_are_refused(tmp_path: Path, bits: int) -> None:
    layer = make_layer(64, 256, bits=bits, symmetric=False, seed=9)
    config = GPTQ | {"bits": bits, "sym": False, "checkpoint_format": "gptq_p"}
    directory = write_checkpoint(tmp_path, {Q: layer}, layout="gptq_v2", quantize_config=config)
    refused(marlinq.open(directory), Q, rf"{Q}: .*gptq_p \(planar\) at {bits} bits")


def test_bits_that_no_kernel_has_are_refused(tmp_path: Path) -> None:
    layer = make_layer(64, 256, bits=6, seed=9)
    directory = write_checkpoint(tmp_path, {Q: layer}, quantize_config=GPTQ | {"bits": 6})
    checkpoint = marlinq.open(directory)
    with pytest.raises((UnsupportedError, InvalidArgumentError), match="6, expected 2, 3, 4 or 8"):
        checkpoint.linear(Q)
    assert not checkpoint.module(Q).supported


def refused(
    checkpoint: marlinq.Checkpoint, name: str, message: str, error: type = UnsupportedError
) -> None:
    """The module is listed with the reason, and its loader raises it."""
    info = checkpoint.module(name)
    assert not info.supported
    assert info.reason is not None
    with pytest.raises(error, match=message) as raised:
        checkpoint.linear(name)
    assert str(raised.value) == info.reason
    assert {"act_order": None, "symmetric": None}.items() <= info.as_dict().items()
    json.dumps([info.as_dict() for info in checkpoint.modules()])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "quant_method awq, expected gptq"),
        ({"quant_method": "awq", "bits": "four", "dynamic": 3}, "quant_method awq"),
        ({"quant_method": "compressed-tensors"}, "quant_method compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format marlin, expected one of gptq, gptq_v2",
        ),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format bitblas"),
        ({"format": "gemm"}, "checkpoint_format gemm"),
        ({"pack_dtype": "int16"}, "pack_dtype int16, expected int32"),
        ({"pack_dtype": "int64"}, "pack_dtype int64, expected int32"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            "auto-round packing_format auto_round:auto_awq, expected auto_round:auto_gptq",
        ),
        ({"quant_method": "auto-round"}, "auto-round packing_format None"),
    ],
)
def test_other_methods_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    layer = make_layer(64, 256, seed=10)
    directory = write_checkpoint(tmp_path, {Q: layer}, quantize_config=config)
    refused(marlinq.open(directory), Q, f"{Q}: {message}")


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round"])
def test_auto_round_files_in_gptq_packing(tmp_path: Path, method: str) -> None:
    layer = make_layer(64, 256, seed=11)
    config = {"quant_method": method, "packing_format": "auto_round:auto_gptq", "bits": 4}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {Q: layer}, quantize_config=config))
    if method.startswith("intel"):
        refused(checkpoint, Q, "quant_method intel/auto-round")
    else:
        check(checkpoint, Q, layer)


def test_tensors_of_other_packings_are_listed_and_refused(tmp_path: Path) -> None:
    words = Tensor("I32", np.zeros((8, 64), np.int32))
    scales = Tensor("F16", np.ones((2, 64), np.float16))
    directory = write_checkpoint(
        tmp_path,
        {
            Q: {"weight_packed": words, "weight_scale": scales},
            K: {"B": words, "s": scales},
            V: LAYERS[V],
        },
    )
    checkpoint = marlinq.open(directory)
    assert [info.name for info in checkpoint.modules()] == [K, Q, V]
    refused(checkpoint, Q, "weight_packed: packed for compressed-tensors")
    refused(checkpoint, K, "B: packed for marlin, expected GPTQ's qweight")
    check(checkpoint, V, LAYERS[V])


def test_one_bad_module_does_not_matter_to_the_others(tmp_path: Path) -> None:
    broken = dict(LAYERS[Q].tensors())
    broken["g_idx"] = Tensor("I32", np.full(256, 99, np.int32))
    lacking = dict(LAYERS[K].tensors())
    del lacking["scales"]
    directory = write_checkpoint(tmp_path, {Q: broken, K: lacking, V: LAYERS[V]})
    checkpoint = marlinq.open(directory)
    assert len(checkpoint.modules()) == 3
    refused(checkpoint, Q, r"g_idx: element \[0\] is 99", InvalidArgumentError)
    refused(checkpoint, K, f"{K}.scales: missing", InvalidFileError)
    check(checkpoint, V, LAYERS[V])


def test_modules_are_in_natural_order(tmp_path: Path) -> None:
    layer = make_layer(32, 32, group_size=32)
    names = [f"model.layers.{i}.proj" for i in (10, 2, 1, 0, 33)]
    checkpoint = marlinq.open(write_checkpoint(tmp_path, dict.fromkeys(names, layer)))
    order = [info.name for info in checkpoint.modules()]
    assert order == [f"model.layers.{i}.proj" for i in (0, 1, 2, 10, 33)]


def test_module_info(tmp_path: Path) -> None:
    layer = make_layer(64, 100, group_size=32, symmetric=False, act_order=True, bias=True)
    config = GPTQ | {"group_size": 32}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {Q: layer}, quantize_config=config))
    info = checkpoint.module(Q)
    stored = sum(tensor.array.nbytes for tensor in layer.tensors().values())
    assert info.as_dict() == {
        "name": Q,
        "bits": 4,
        "group_size": 32,
        "k": 100,
        "n": 64,
        "bytes": stored,
        "bias": True,
        "checkpoint_format": "gptq",
        "act_order": True,
        "symmetric": False,
        "zero_points": "v1",
        "supported": True,
        "reason": None,
        "warnings": [],
    }
    assert info.shape == (64, 100)
    assert Q in repr(info)
    assert checkpoint.module(Q) is info


def test_group_sizes_by_the_tensors(tmp_path: Path) -> None:
    """The configuration says 128 of all of them."""
    layers = {}
    for k, group_size in [
        (256, 16),
        (256, 64),
        (256, -1),
        (320, 128),
        (288, 100),
        (1408, 1024),
        (2048, 1024),
        (96, 40),
    ]:
        for act_order in (False, True):
            layers[f"{k}.{group_size}.{act_order}"] = make_layer(
                64, k, group_size=group_size, act_order=act_order, seed=k
            )
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers, quantize_config=GPTQ))
    for name, layer in layers.items():
        x = normal((3, layer.k), seed=2)
        assert_close(checkpoint.linear(name)(x), layer.expected(x), LINEAR_BOUND, name)


def test_shapes_override_the_configuration(tmp_path: Path) -> None:
    layer = make_layer(64, 256, bits=8, group_size=32, seed=12)
    config = GPTQ | {"bits": 4, "group_size": 128}
    check(marlinq.open(write_checkpoint(tmp_path, {Q: layer}, quantize_config=config)), Q, layer)


def test_the_caller_overrides_everything(tmp_path: Path) -> None:
    layer = make_layer(64, 320, group_size=100, symmetric=False, seed=13)
    tensors = layer.tensors("gptq_v2", g_idx=False)
    directory = write_checkpoint(tmp_path, {Q: tensors}, quantize_config=GPTQ)
    checkpoint = marlinq.open(directory, bits=4, group_size=100, checkpoint_format="gptq_v2")
    check(checkpoint, Q, layer)
    assert checkpoint.module(Q).checkpoint_format == "gptq_v2"
    with pytest.raises(InvalidArgumentError, match=rf"{Q}\.\w+: shape .* bits = 8"):
        marlinq.open(directory, bits=8, group_size=100).linear(Q)
    with pytest.raises(InvalidArgumentError, match=rf"{Q}\.scales: shape \[4, 64\], expected"):
        marlinq.open(directory, group_size=64).linear(Q)
    x = normal((3, 320), 1)
    shifted = with_zeros(layer, layer.zeros + 1)
    v1 = marlinq.open(directory, group_size=100, checkpoint_format="gptq").linear(Q)
    # A v2 zero of 15 reads as 0 in v1 with a carry into the next field; leave such columns out.
    plain = np.flatnonzero((layer.zeros < 15).all(0) & (np.roll(layer.zeros, 1, 1) < 15).all(0))
    expected = shifted.expected(x)
    assert_close(
        v1(x)[:, plain],
        Expected(expected.y[:, plain], expected.magnitude[:, plain]),
        LINEAR_BOUND,
        "v2 read as v1",
    )


@pytest.mark.parametrize("layout", ["auto", None])
def test_auto_is_no_override(tmp_path: Path, layout: str | None) -> None:
    layer = make_layer(64, 256, symmetric=False, seed=5)
    config = GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}
    directory = write_checkpoint(tmp_path, {Q: layer}, layout="gptq_v2", quantize_config=config)
    check(marlinq.open(directory, checkpoint_format=layout), Q, layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_format": "awq"}, "checkpoint_format: 'awq', expected one of auto, gptq"),
        ({"bits": 5}, "5, expected 2, 3, 4 or 8"),
        ({"bits": 0}, "0, expected 2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size: 0, expected -1 or at least 1"),
        ({"group_size": -2}, "group_size: -2, expected -1 or at least 1"),
    ],
)
def test_refused_overrides(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, {Q: LAYERS[Q]})
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.open(tmp_path, **options).linear(Q)


DYNAMIC = {
    "a.proj": make_layer(64, 64, group_size=32, symmetric=False, seed=20),
    "b.proj": make_layer(64, 64, group_size=32, symmetric=False, seed=21),
    "lm_head": make_layer(64, 64, bits=8, group_size=32, symmetric=False, seed=22),
}


def _open_dynamic(
    directory: Path, rules: dict[str, Any], layouts: dict[str, str]
) -> marlinq.Checkpoint:
    modules = {
        name: layer.tensors(layouts.get(name, "gptq"), g_idx=False)
        for name, layer in DYNAMIC.items()
    }
    config = GPTQ | {"sym": False, "group_size": 32, "lm_head": True, "dynamic": rules}
    return marlinq.open(write_checkpoint(directory, modules, quantize_config=config))


@pytest.mark.parametrize("prefix", ["", "+:"])
def test_dynamic_overrides(tmp_path: Path, prefix: str) -> None:
    """The overridden format of the zero points shows which rule was taken."""
    rules = {
        f"{prefix}lm_head": {"bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
        rf"{prefix}a\..*": {"checkpoint_format": "gptq_v2"},
    }
    checkpoint = _open_dynamic(tmp_path, rules, {"lm_head": "gptq_v2", "a.proj": "gptq_v2"})
    for name, layer in DYNAMIC.items():
        check(checkpoint, name, layer)
    assert checkpoint.module("lm_head").bits == 8
    assert checkpoint.module("b.proj").checkpoint_format == "gptq"


def test_the_first_matching_rule_wins(tmp_path: Path) -> None:
    rules = {
        r"b\.": {"checkpoint_format": "gptq"},
        r"+:.*proj": {"checkpoint_format": "gptq_v2"},
        r"a\.proj": {"checkpoint_format": "gptq"},
    }
    checkpoint = _open_dynamic(tmp_path, rules, {"a.proj": "gptq_v2"})
    check(checkpoint, "a.proj", DYNAMIC["a.proj"])
    check(checkpoint, "b.proj", DYNAMIC["b.proj"])


def test_patterns_match_from_the_start(tmp_path: Path) -> None:
    """As re.match does: "proj" is no prefix of "a.proj", while "a" is one."""
    rules = {"proj": {"checkpoint_format": "marlin"}, "a": {"checkpoint_format": "gptq_v2"}}
    checkpoint = _open_dynamic(tmp_path, rules, {"a.proj": "gptq_v2"})
    for name, layer in DYNAMIC.items():
        check(checkpoint, name, layer)


def test_excluded_modules(tmp_path: Path) -> None:
    """A `-:` rule names modules with plain weights; packed tensors are believed all the same."""
    rules = {r"-:.*gate": {}, r"-:a\.": {}, r"a\.": {"checkpoint_format": "marlin"}}
    checkpoint = _open_dynamic(tmp_path, rules, {})
    check(checkpoint, "a.proj", DYNAMIC["a.proj"])


def test_a_rule_for_one_module_refuses_only_that(tmp_path: Path) -> None:
    checkpoint = _open_dynamic(tmp_path, {r"a\.": {"checkpoint_format": "marlin"}}, {})
    refused(checkpoint, "a.proj", "a.proj: checkpoint_format marlin")
    check(checkpoint, "b.proj", DYNAMIC["b.proj"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dynamic": {"(": {}}}, r"dynamic '\(': not a regular expression"),
        ({"dynamic": ["a"]}, "dynamic: list, expected an object"),
        ({"dynamic": {"a": [1]}}, "dynamic 'a': list, expected an object"),
        ({"dynamic": {"a": {"bits": "x"}}}, "dynamic 'a': bits: 'x', expected an integer"),
        ({"bits": "four"}, "bits: 'four', expected an integer"),
        ({"bits": 4.5}, "bits: 4.5, expected an integer"),
        ({"bits": True}, "bits: True, expected an integer"),
        ({"group_size": [128]}, r"group_size: \[128\], expected an integer"),
        ({"group_size": 1e400}, "group_size: inf, expected an integer"),
        ({"sym": "yes"}, "sym: 'yes', expected true or false"),
        ({"desc_act": 1}, "desc_act: 1, expected true or false"),
        ({"checkpoint_format": 2}, "checkpoint_format: 2, expected a string"),
        ({"quant_method": ["gptq"]}, "quant_method: .*, expected a string"),
    ],
)
@pytest.mark.parametrize("place", ["quantize_config.json", "config.json"])
def test_configurations_that_make_no_sense(
    tmp_path: Path, config: dict[str, Any], message: str, place: str
) -> None:
    write_checkpoint(tmp_path, {Q: LAYERS[Q]})
    content = config if place == "quantize_config.json" else {"quantization_config": config}
    (tmp_path / place).write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match=message) as raised:
        marlinq.open(tmp_path)
    assert str(tmp_path / place) in str(raised.value)


def test_null_is_the_same_as_absent(tmp_path: Path) -> None:
    layer = make_layer(64, 256, seed=14)
    config = dict.fromkeys([*GPTQ, "checkpoint_format", "format", "dynamic", "pack_dtype"])
    directory = write_checkpoint(
        tmp_path, {Q: layer}, quantize_config=config, config={"quantization_config": None}
    )
    check(marlinq.open(directory), Q, layer)


def test_unknown_modules_list_near_names(tmp_path: Path) -> None:
    checkpoint = marlinq.open(write_checkpoint(tmp_path, LAYERS))
    wrong = Q.replace("self_attn", "attn")
    for call in (checkpoint.linear, checkpoint.module, checkpoint.reference):
        with pytest.raises(
            InvalidArgumentError, match=f"{wrong}: no such module; near names: .*{Q}"
        ):
            call(wrong)
    with pytest.raises(InvalidArgumentError, match=r"zzz: no such module$"):
        checkpoint.linear("zzz")
    with pytest.raises(InvalidArgumentError, match=f"no such tensor; near names: .*{Q}.qweight"):
        checkpoint.tensor(f"{Q}.qweigt")
    assert wrong not in checkpoint


def test_modules_that_are_not_quantised_say_so(tmp_path: Path) -> None:
    weight = Tensor("BF16", np.zeros((16, 256), np.uint16))
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, LAYERS, others={"model.embed_tokens.weight": weight})
    )
    message = r"model.embed_tokens: not quantised; its weight is BF16 \[16, 256\]"
    with pytest.raises(InvalidArgumentError, match=message):
        checkpoint.linear("model.embed_tokens")
    with pytest.raises(InvalidArgumentError, match=message):
        checkpoint.linear([Q, "model.embed_tokens"])
    assert "model.embed_tokens" not in checkpoint


def test_a_checkpoint_without_quantised_modules(tmp_path: Path) -> None:
    weight = Tensor("F32", normal((4, 4), 1))
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {}, others={"a.weight": weight}))
    assert checkpoint.modules() == []
    assert len(checkpoint) == 0
    np.testing.assert_array_equal(checkpoint.tensor("a.weight"), weight.array)


def test_fused_modules_with_permutations_of_their_own(tmp_path: Path, kernel: str) -> None:
    layers = {
        Q: make_layer(64, 256, group_size=64, symmetric=False, act_order=True, bias=True, seed=1),
        K: make_layer(32, 256, group_size=64, symmetric=False, act_order=True, seed=2),
        V: make_layer(33, 256, group_size=64, symmetric=True, seed=3),
    }
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers))
    fused = checkpoint.linear([Q, K, V], kernel=kernel)
    assert fused.describe()["fused"] == [64, 32, 33]
    assert fused.out_features == 129
    x = normal((7, 256), seed=4)
    bias = np.concatenate([layers[Q].bias, np.zeros(65)])
    dense = fuse(list(layers.values()))
    wide = x.astype(np.float64)
    expected = Expected(wide @ dense.T + bias, np.square(wide) @ np.square(dense).T)
    assert_close(fused(x), expected, LINEAR_BOUND, "q, k, v")
    # In the order asked for.
    swapped = checkpoint.linear([V, Q], kernel=kernel)(x)
    np.testing.assert_array_equal(swapped[:, :33], checkpoint.linear(V, kernel=kernel)(x))
    np.testing.assert_array_equal(swapped[:, 33:], checkpoint.linear(Q, kernel=kernel)(x))


def test_fused_modules_that_share_a_permutation(tmp_path: Path) -> None:
    gate = make_layer(64, 256, group_size=64, act_order=True, seed=1)
    up = make_layer(64, 256, group_size=64, act_order=True, seed=1)
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {"gate": gate, "up": up}))
    x = normal((7, 256), seed=5)
    fused = checkpoint.linear(["gate", "up"])(x)
    np.testing.assert_array_equal(fused[:, :64], checkpoint.linear("gate")(x))
    np.testing.assert_array_equal(fused[:, 64:], checkpoint.linear("up")(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_layer(64, 256, bits=8), "8 bits, group_size 128"),
        (make_layer(64, 256, group_size=64), "4 bits, group_size 64"),
        (make_layer(64, 384), r"b\.qweight: shape \[48, 64\], expected .* = \[32, 64\]"),
    ],
)
def test_fused_modules_must_fit(tmp_path: Path, other: Layer, message: str) -> None:
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {"a": make_layer(64, 256), "b": other}))
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        checkpoint.linear(["a", "b"])
    assert "b" in str(raised.value)


def test_fused_modules_with_different_labels(tmp_path: Path) -> None:
    layer = make_layer(64, 256, symmetric=False)
    rules = {"dynamic": {"a": {"checkpoint_format": "gptq_v2"}}, "checkpoint_format": "gptq"}
    modules = {"a": layer.tensors("gptq_v2"), "b": layer.tensors("gptq")}
    write_checkpoint(tmp_path, modules, quantize_config=rules)
    checkpoint = marlinq.open(tmp_path)
    for name in modules:
        check(checkpoint, name, layer)
    with pytest.raises(InvalidArgumentError, match="a, b: labelled with different checkpoint fo"):
        checkpoint.linear(["a", "b"])


def test_fused_modules_of_which_one_is_said_to_be_symmetric(tmp_path: Path) -> None:
    layers = {"a": make_layer(64, 256), "b": make_layer(64, 256, symmetric=False)}
    rules = {"dynamic": {"a": {"sym": True}}, "sym": False}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers, quantize_config=rules))
    x = normal((7, 256), seed=6)
    fused = checkpoint.linear(["a", "b"])(x)
    for start, name in ((0, "a"), (64, "b")):
        np.testing.assert_array_equal(fused[:, start : start + 64], checkpoint.linear(name)(x))


def test_an_empty_list_of_modules(tmp_path: Path) -> None:
    checkpoint = marlinq.open(write_checkpoint(tmp_path, LAYERS))
    with pytest.raises(InvalidArgumentError, match="name: an empty list"):
        checkpoint.linear([])


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_scales_of_every_type(tmp_path: Path, dtype: str) -> None:
    layer = make_layer(64, 256, symmetric=False, bias=True, scale_dtype=dtype, bias_dtype=dtype)
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {Q: layer}))
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    assert check(checkpoint, Q, layer).describe()["scale_dtype"] == names[dtype]


def test_fused_modules_with_scales_of_different_types(tmp_path: Path) -> None:
    """Either runs exactly or is refused with both types named."""
    layers = {"a": make_layer(64, 256), "b": make_layer(64, 256, scale_dtype="BF16")}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, layers))
    x = normal((7, 256), seed=6)
    fused = checkpoint.linear(["a", "b"])(x)
    for start, name in ((0, "a"), (64, "b")):
        np.testing.assert_array_equal(fused[:, start : start + 64], checkpoint.linear(name)(x))


def test_tensor_gives_views_of_the_file(tmp_path: Path) -> None:
    values = round_to(normal((4, 8), 1), "BF16")
    words = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    others = {
        "a": Tensor("BF16", words),
        "b": Tensor("F32", normal((3,), 2)),
        "c": Tensor("I64", np.arange(6).reshape(2, 3)),
        "empty": Tensor("F16", np.zeros((0, 4), np.float16)),
    }
    checkpoint = marlinq.open(write_checkpoint(tmp_path, {}, others=others))
    for name, tensor in others.items():
        found = checkpoint.tensor(name)
        np.testing.assert_array_equal(found, tensor.array)
        assert found.dtype == tensor.array.dtype
        assert not found.flags.writeable


def test_a_loaded_module_outlives_checkpoint_and_file(tmp_path: Path) -> None:
    directory = copy_data("llama2-w4-g128-actorder", tmp_path)
    linear = marlinq.open(directory).linear(Q)
    x = normal((3, 256), seed=1)
    before = linear(x)
    (directory / "model.safetensors").unlink()
    np.testing.assert_array_equal(linear(x), before)


def test_a_file_that_shrinks_after_opening_is_no_crash(tmp_path: Path) -> None:
    directory = copy_data("llama2-w4-g128-actorder", tmp_path)
    file = directory / "model.safetensors"
    checkpoint = marlinq.open(directory)
    file.write_bytes(file.read_bytes()[:20000])
    with pytest.raises(InvalidFileError, match="but the file has 20000"):
        checkpoint.linear(Q)


def test_every_checkpoint_of_the_data_opens_by_file_too() -> None:
    for directory in DATA.glob("*-*"):
        whole = [info.as_dict() for info in marlinq.open(directory).modules()]
        assert [
            info.as_dict() for info in marlinq.open(directory / "model.safetensors").modules()
        ] == whole


def test_a_bias_in_a_later_fused_module_is_described(tmp_path: Path) -> None:
    layers = {"a.q": make_layer(64, 128, seed=40), "a.k": make_layer(32, 128, bias=True, seed=41)}
    write_checkpoint(tmp_path, layers)
    assert marlinq.open(tmp_path).linear(list(layers)).describe()["bias"] is True
