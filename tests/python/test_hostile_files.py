"""Damaged and hostile files: each is refused by name, and earlier objects go on working."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import (
    Tensor,
    describe_tensors,
    encode_header,
    floats,
    make_layer,
    named,
    write_checkpoint,
    write_safetensors,
)
from marlinq.errors import InvalidArgumentError, InvalidFileError, MarlinqError
from support import normal

LAYER = make_layer(64, 256, symmetric=False, act_order=True, bias=True)
HEADER, BODY = describe_tensors(named("proj", LAYER.tensors()))
Header = dict[str, Any]


@pytest.fixture(autouse=True)
def module_loaded_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs a module of a sound checkpoint before and after every test."""
    sound = write_checkpoint(tmp_path_factory.mktemp("sound"), {"proj": LAYER})
    linear = marlinq.open(sound).linear("proj")
    x = normal((3, 256), seed=1)
    before = linear(x)
    yield
    np.testing.assert_array_equal(linear(x), before)


def changed(**fields: Any) -> Header:
    """The header with fields of proj.scales replaced."""
    return HEADER | {"proj.scales": HEADER["proj.scales"] | fields}


def begin_of(name: str) -> int:
    return int(HEADER[name]["data_offsets"][0])


def refused_at_open(path: Path, message: str = "not a sound safetensors file") -> None:
    with pytest.raises(InvalidFileError, match=message) as raised:
        marlinq.open(path)
    assert str(path) in str(raised.value)


SOUND = encode_header(HEADER) + BODY
_HEADER_END = len(encode_header(HEADER))


@pytest.mark.parametrize("length", [*range(0, 17), *range(17, len(SOUND), 397), len(SOUND) - 1])
def test_truncated(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND[:length])
    refused_at_open(file)
    with pytest.raises(InvalidFileError, match=r"model\.safetensors"):
        marlinq.open(tmp_path)


def test_the_sound_file_is_sound(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND)
    np.testing.assert_array_equal(marlinq.open(file).reference("proj").dequantize(), LAYER.dense())


@pytest.mark.parametrize(
    "length",
    [
        *(0, 1, _HEADER_END - 9, _HEADER_END - 7, len(SOUND), len(SOUND) * 2),
        *(100_000_001, 2**31, 2**32, 2**63, 2**64 - 8, 2**64 - 1),
    ],
)
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + SOUND[8:])
    refused_at_open(file)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"3",
        b"{}}",
        b"\xff\xfe\x00\x01",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F16"}}',
        b'{"a": {"dtype": "F16", "shape": [1]}}',
        b'{"a": {"dtype": "F16", "shape": "x", "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "F16", "shape": [1.5], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}',
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"a": 3}}',
        b'{"a": ' * 20000 + b"1" + b"}" * 20000,
        b"[" * 100000 + b"]" * 100000,
    ],
)
def test_headers_that_are_none(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_header(text) + b"\0\0")
    refused_at_open(file)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (changed(data_offsets=[0, 2]), BODY),
        (changed(data_offsets=[begin_of("proj.scales"), len(BODY) + 100]), BODY),
        (changed(data_offsets=[2**62, 2**62 + 256]), BODY),
        (changed(data_offsets=[2**64, 2**64 + 256]), BODY),
        (changed(data_offsets=[-256, 0]), BODY),
        (changed(data_offsets=[begin_of("proj.scales") + 8, begin_of("proj.scales")]), BODY),
        (changed(data_offsets=HEADER["proj.qzeros"]["data_offsets"]), BODY),
        (changed(shape=[2, 65]), BODY),
        (changed(shape=[2, 2, 64]), BODY),
        (changed(shape=[]), BODY),
        (changed(shape=[0, 64]), BODY),
        (changed(shape=[2**62, 4]), BODY),
        (changed(shape=[2**32, 2**32]), BODY),
        (changed(shape=[2**63, 2**63, 4]), BODY),
        (changed(shape=[2**64, 1]), BODY),
        (changed(dtype="F32"), BODY),
        (changed(dtype="F12"), BODY),
        (changed(dtype=""), BODY),
        (changed(dtype="f16"), BODY),
        (HEADER, BODY + b"\0" * 64),
        (HEADER, BODY[:-2]),
        (HEADER, b""),
    ],
)
def test_headers_that_contradict_the_data(tmp_path: Path, header: Header, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_header(header) + data)
    refused_at_open(file)


def test_a_hole_between_tensors(tmp_path: Path) -> None:
    header = {
        name: entry | {"data_offsets": [offset + 64 for offset in entry["data_offsets"]]}
        for name, entry in HEADER.items()
    }
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_header(header) + b"\0" * 64 + BODY)
    refused_at_open(file)


def test_duplicate_names(tmp_path: Path) -> None:
    """Readers differ in which of the two counts, so neither may."""
    text = json.dumps(HEADER)
    twice = text[:-1] + ', "proj.bias": ' + json.dumps(HEADER["proj.bias"]) + "}"
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_header(twice.encode()) + BODY)
    refused_at_open(file, "proj.bias|duplicate")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    for name, content in (
        ("empty.safetensors", b""),
        ("zip.safetensors", b"PK\x03\x04" + b"\0" * 1000),
        ("text.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        ("model.bin", b"\x80\x04\x95"),
    ):
        (tmp_path / name).write_bytes(content)
        refused_at_open(tmp_path / name)


Change = Callable[[dict[str, Tensor]], None]


def _put(name: str, place: Any, value: Any) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        array = tensors[name].array.copy()
        array[place] = value
        tensors[name] = tensors[name]._replace(array=array)

    return change


def _set(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(name, tensor)


def _drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


WORDS = LAYER.tensors()["qweight"].array
HALF = LAYER.tensors()["scales"].array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _put("scales", (1, 3), np.nan),
            r"proj\.scales: element \[1, 3\] is -?nan, expected a fin",
        ),
        (_put("scales", (0, 63), np.inf), r"proj\.scales: element \[0, 63\] is inf"),
        (_put("scales", (0, 0), -np.inf), r"proj\.scales: element \[0, 0\] is -inf"),
        (_put("bias", 7, np.nan), r"proj\.bias: element \[7\] is -?nan"),
        (
            _put("g_idx", 100, 2),
            r"proj\.g_idx: element \[100\] is 2, expected -2 to 1 for 2 groups",
        ),
        (_put("g_idx", 0, -3), r"proj\.g_idx: element \[0\] is -3, expected -2 to 1"),
        (_put("g_idx", 255, 2**31 - 1), r"proj\.g_idx: element \[255\] is 2147483647"),
        (_put("g_idx", 5, -(2**31)), r"proj\.g_idx: element \[5\] is -2147483648"),
        (_set("qweight", Tensor("I32", WORDS[:-1])), r"proj\.qweight: shape \[31, 64\], expected"),
        (_set("qweight", Tensor("I32", WORDS[:, :-1])), r"proj\.\w+: shape"),
        (
            _set("qweight", Tensor("I32", WORDS.reshape(-1))),
            r"proj\.qweight: 1 dimensions, expected",
        ),
        (_set("qweight", Tensor("I32", WORDS[None])), r"proj\.qweight: 3 dimensions, expected"),
        (_set("qweight", Tensor("F32", WORDS.view(np.float32))), r"proj\.qweight: dtype float32"),
        (_set("qweight", Tensor("I64", WORDS.astype(np.int64))), r"proj\.qweight: dtype int64"),
        (_set("qweight", Tensor("U8", WORDS.view(np.uint8))), r"proj\.qweight: dtype U8, expected"),
        (_set("qweight", Tensor("I32", WORDS[:0])), r"proj\.qweight: shape \[0, 64\]"),
        (_set("qweight", Tensor("I32", WORDS[:, :0])), r"proj\.qweight: n = 0 output features"),
        (_set("scales", Tensor("F16", HALF[:1])), r"proj\.\w+: shape"),
        (_set("scales", Tensor("F16", HALF[:, 1:])), r"proj\.scales: shape \[2, 63\], expected"),
        (_set("scales", Tensor("F16", HALF[0])), r"proj\.scales: 1 dimensions, expected 2"),
        (_set("scales", Tensor("I32", WORDS[:2])), r"proj\.scales: dtype int32, expected float32"),
        (_set("qzeros", Tensor("I32", WORDS[:2, :7])), r"proj\.qzeros: shape \[2, 7\], expected"),
        (_set("qzeros", Tensor("I32", WORDS[:3, :8])), r"proj\.qzeros: shape \[3, 8\], expected"),
        (
            _set("qzeros", Tensor("F16", HALF[:, :8])),
            r"proj\.qzeros: dtype float16, expected int32",
        ),
        (_set("g_idx", Tensor("I32", WORDS[0, :63])), r"proj\.\w+: shape"),
        (_set("g_idx", Tensor("I64", np.zeros(256, np.int64))), r"proj\.g_idx: dtype int64"),
        (_set("g_idx", Tensor("I32", np.zeros((256, 1), np.int32))), r"proj\.g_idx: 2 dimensions"),
        (_set("g_idx", Tensor("I32", np.zeros(0, np.int32))), r"proj\.\w+: .*k = 0"),
        (_set("bias", floats(np.zeros(63), "F16")), r"proj\.bias: shape \[63\], expected \[n\] ="),
        (_set("bias", floats(np.zeros((1, 64)), "F16")), r"proj\.bias: 2 dimensions, expected 1"),
        (_set("bias", Tensor("I32", WORDS[0])), r"proj\.bias: dtype int32, expected float32"),
        (_drop("scales"), r"proj\.scales: missing"),
    ],
)
def test_damaged_modules(tmp_path: Path, change: Change, message: str) -> None:
    tensors = dict(LAYER.tensors())
    change(tensors)
    file = write_safetensors(
        tmp_path / "model.safetensors",
        named("proj", tensors) | named("other", LAYER.tensors()),
    )
    checkpoint = marlinq.open(file)
    info = checkpoint.module("proj")
    with pytest.raises((InvalidFileError, InvalidArgumentError), match=message) as raised:
        checkpoint.linear("proj")
    assert info.reason == str(raised.value)
    assert json.dumps(info.as_dict())
    for name in (["other", "proj"], ["proj", "other"]):
        with pytest.raises(MarlinqError):
            checkpoint.linear(name)
    # The other module of the same file is none the worse.
    eye = np.eye(256, dtype=np.float32)
    np.testing.assert_array_equal(
        checkpoint.linear("other", compute="float32")(eye),
        LAYER.dense().T.astype(np.float32) + LAYER.bias.astype(np.float32),
    )


def test_types_that_numpy_has_not(tmp_path: Path) -> None:
    header, body = describe_tensors({"a": Tensor("U8", np.arange(8, dtype=np.uint8))})
    header["a"]["dtype"] = "F8_E4M3"
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_header(header) + body)
    checkpoint = marlinq.open(file)
    assert checkpoint.modules() == []
    with pytest.raises(InvalidFileError, match="a: dtype F8_E4M3 cannot be read"):
        checkpoint.tensor("a")


def test_scalars_as_tensors(tmp_path: Path) -> None:
    for name in ("qweight", "scales", "qzeros", "g_idx", "bias"):
        tensors = dict(LAYER.tensors())
        tensors[name] = Tensor(tensors[name].dtype, tensors[name].array.reshape(-1)[0])
        checkpoint = marlinq.open(write_checkpoint(tmp_path / name, {"proj": tensors}))
        with pytest.raises(MarlinqError, match=rf"proj\.{name}"):
            checkpoint.linear("proj")


INDEX = "model.safetensors.index.json"


def write_index(directory: Path, content: Any) -> Path:
    write_safetensors(directory / "model-1.safetensors", named("proj", LAYER.tensors()))
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / INDEX).write_bytes(text)
    return directory


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b"[]", "list, expected a JSON object"),
        (b"3", "int, expected a JSON object"),
        ({}, "weight_map is missing"),
        ({"weight_map": None}, "weight_map is missing"),
        ({"weight_map": []}, "weight_map is missing"),
        ({"weight_map": {"proj.qweight": 3}}, "weight_map is missing or does not map"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors, which does not exist"),
        ({"weight_map": {"nothing": "model-1.safetensors"}}, "places nothing in model-1.safetens"),
        ({"weight_map": {"a": "../model-1.safetensors"}}, "expected a file beside the index"),
        ({"weight_map": {"a": "x/../../model-1.safetensors"}}, "expected a file beside the index"),
        ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd, expected a file beside the index"),
        ({"weight_map": {"a": ""}}, "which does not exist|not a file"),
        ({"weight_map": {"a": "."}}, "which does not exist"),
        ({"weight_map": {"a": "model-1.safetensors\0"}}, "names the shard"),
        ({"weight_map": {"a": INDEX}}, "not a sound safetensors file"),
    ],
)
def test_hostile_indices(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "inner").mkdir()
    write_safetensors(tmp_path / "model-1.safetensors", named("proj", LAYER.tensors()))
    directory = write_index(tmp_path / "inner", content)
    for path in (directory, directory / INDEX):
        with pytest.raises(InvalidFileError, match=message) as raised:
            marlinq.open(path)
        assert INDEX in str(raised.value)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    weight_map = {"weight_map": {"a": "model-2.safetensors"}}
    write_index(tmp_path, weight_map)
    (tmp_path / "model-2.safetensors").write_bytes(SOUND[:100])
    with pytest.raises(InvalidFileError, match=r"model-2\.safetensors"):
        marlinq.open(tmp_path)


def test_several_indices(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(
        InvalidFileError, match=r"several indices \(a\.safe.*, b\.safe.*\); open one"
    ):
        marlinq.open(tmp_path)


def test_directories_without_safetensors(tmp_path: Path) -> None:
    refused_at_open(tmp_path, r"no \*\.safetensors file in this directory")
    (tmp_path / "model.safetensors").mkdir()
    refused_at_open(tmp_path, r"no \*\.safetensors file in this directory")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused_at_open(tmp_path, r"no \*\.safetensors file")


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.safetensors", "a/b/c", "x.index.json"])
def test_paths_that_do_not_exist(tmp_path: Path, missing: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        marlinq.open(tmp_path / missing)
    assert raised.value.filename == str(tmp_path / missing)
    assert not isinstance(raised.value, MarlinqError)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\x80abc", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b"[1]", "list, expected a JSON object"),
        (b"null", "NoneType, expected a JSON object"),
    ],
)
def test_configurations_that_are_not_json(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write_checkpoint(tmp_path, {"proj": LAYER})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidFileError, match=message) as raised:
        marlinq.open(tmp_path)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("table", [3, "gptq", [], True])
def test_a_quantization_config_that_is_no_object(tmp_path: Path, table: Any) -> None:
    write_checkpoint(tmp_path, {"proj": LAYER}, config={"quantization_config": table})
    with pytest.raises(InvalidFileError, match=r"quantization_config: .*, expected an object"):
        marlinq.open(tmp_path)


def test_modules_with_strange_names(tmp_path: Path) -> None:
    names = [
        "",
        "a b",
        "ü.ß",
        "x" * 2000,
        "a/b",
        "..",
        "experts",
        "m.experts.0.",
        "m.experts.-1.w1",
    ]
    directory = write_checkpoint(tmp_path, dict.fromkeys(names, LAYER))
    checkpoint = marlinq.open(directory)
    assert {info.name for info in checkpoint.modules()} == set(names)
    for name in names:
        assert checkpoint.linear(name).in_features == 256
        assert json.dumps(checkpoint.module(name).as_dict())


@pytest.mark.parametrize("number", [10**6, 10**18, 10**30])
def test_expert_numbers_that_are_huge(tmp_path: Path, number: int) -> None:
    """A name costs a few bytes; no loop may run to the number in it."""
    modules = {f"m.experts.{number}.down_proj": LAYER}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, modules))
    with pytest.raises(InvalidArgumentError, match=r"m\.experts\.0: missing"):
        checkpoint.expert_stack("m.experts", "down_proj")


def test_experts_numbered_in_other_scripts(tmp_path: Path) -> None:
    modules = {"m.experts.٣.down_proj": LAYER, "m.experts.0.down_proj": LAYER}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, modules))
    with pytest.raises(InvalidArgumentError, match=r"m\.experts\.") as raised:
        checkpoint.expert_stack("m.experts", "down_proj")
    assert "missing" in str(raised.value) or "no such module" in str(raised.value)


def test_patterns_of_dynamic_that_never_end(tmp_path: Path) -> None:
    """Short names keep a regular expression of the file from running away here."""
    rules = {"dynamic": {"(a+)+$": {"bits": 8}}}
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, {"a" * 12 + "b": LAYER}, quantize_config=rules)
    )
    assert checkpoint.modules()[0].bits == 4
