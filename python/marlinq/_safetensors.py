"""The safetensors files of a checkpoint: tensors are views into the mapped files.

`safetensors` itself validates every file; this module reads only the header, for the places.
"""

import errno
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from marlinq.errors import InvalidFileError

# What numpy reads a tensor as. bfloat16 has no numpy type: its words are given as uint16.
_NUMPY_DTYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidFileError: The file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidFileError(f"{path}: {type(content).__name__}, expected a JSON object")
    return content


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: which of two equal ones counts, readers do not agree on."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise InvalidFileError(f"{path}: names {twice} twice, expected unique names")
    return content


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, after safetensors found the file sound.

    Raises:
        InvalidFileError: The file is damaged; the message gives the reason.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise InvalidFileError(f"{path}: not a sound safetensors file: {error}") from error
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(
            stream.read(length), object_pairs_hook=lambda pairs: _unique(path, pairs)
        )
    start = 8 + length
    return {
        name: TensorEntry(
            path,
            tensor["dtype"],
            tuple(tensor["shape"]),
            start + tensor["data_offsets"][0],
            start + tensor["data_offsets"][1],
        )
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def _merge_shards(files: list[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise InvalidFileError(
                    f"{file}: holds {name}, which {entries[name].file.name} holds too, and "
                    "there is no index that tells which one counts; open one of the files"
                )
            entries[name] = entry
    return entries


def _indexed_shards(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise InvalidFileError(
            f"{index}: weight_map is missing or does not map tensors to file names"
        )
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise InvalidFileError(
                f"{index}: names the shard {shard}, expected a file beside the index"
            )
        if not file.is_file():
            raise InvalidFileError(f"{index}: names the shard {shard}, which does not exist")
        shards[shard] = read_header(file)
    entries: dict[str, TensorEntry] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InvalidFileError(f"{index}: places {name} in {shard}, which does not hold it")
        entries[name] = shards[shard][name]
    # A tensor that the index forgot still belongs to its module: act-order without its g_idx would
    # be wrong.
    for tensors in shards.values():
        for name, entry in tensors.items():
            entries.setdefault(name, entry)
    return entries


def _find_tensors(path: Path) -> dict[str, TensorEntry]:
    if path.is_file():
        return _indexed_shards(path) if path.name.endswith(".json") else read_header(path)
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    indices = sorted(path.glob("*.safetensors.index.json"))
    usual = path / "model.safetensors.index.json"
    if usual in indices or len(indices) == 1:
        return _indexed_shards(usual if usual in indices else indices[0])
    if indices:
        names = ", ".join(index.name for index in indices)
        raise InvalidFileError(f"{path}: several indices ({names}); open one of them")
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        raise InvalidFileError(f"{path}: no *.safetensors file in this directory")
    return _merge_shards(files)


class TensorFiles:
    """All tensors of a checkpoint by name.

    Args:
        path: A safetensors file, an index, or a directory with an index or any *.safetensors.

    Raises:
        FileNotFoundError: The path does not exist.
        InvalidFileError: A file is damaged, or the index does not agree with the shards.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path if path.is_dir() else path.parent
        self._entries = _find_tensors(path)
        self._mappings: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """The tensors' names."""
        return iter(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor that exists."""
        return self._entries[name]

    def get(self, name: str) -> TensorEntry | None:
        """Dtype, shape and place of a tensor, or None."""
        return self._entries.get(name)

    def view(self, name: str) -> memoryview:
        """The bytes of a tensor in the mapped file, read only and of any alignment."""
        entry = self._entries[name]
        mapping = self._mappings.get(entry.file)
        if mapping is None:
            with entry.file.open("rb") as stream:
                mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._mappings[entry.file] = mapping
        if entry.end > len(mapping):
            raise InvalidFileError(
                f"{entry.file}: {name} ends at byte {entry.end}, but the file has {len(mapping)}"
            )
        return memoryview(mapping)[entry.begin : entry.end]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as a view into the mapped file; bfloat16 as its uint16 words.

        Raises:
            InvalidFileError: numpy has no type for it.
        """
        entry = self._entries[name]
        if entry.dtype not in _NUMPY_DTYPES:
            raise InvalidFileError(f"{name}: dtype {entry.dtype} cannot be read")
        return np.frombuffer(self.view(name), _NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)
