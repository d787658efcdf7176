"""One quantised module of a checkpoint: what its tensors say, and its hand-over to the core."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from marlinq import _core
from marlinq._config import QuantConfig
from marlinq._safetensors import TensorFiles
from marlinq.errors import InvalidArgumentError, InvalidFileError, MarlinqError, UnsupportedError
from marlinq.linear import zero_points_of

TENSORS = ("qweight", "scales", "qzeros", "g_idx", "bias")
# The last part of a tensor's name that makes a module one of another packing.
FOREIGN_TENSORS = {"weight_packed": "compressed-tensors", "B": "marlin"}

_CORE_DTYPES = {
    "I32": "int32",
    "U32": "int32",
    "I64": "int64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
_BITS_BY_LIKELIHOOD = (4, 8, 2, 3, 6, 5, 7)
_USUAL_GROUPS = (128, 64, 32, 256, 1024, 16, 512)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _some(names: Sequence[str]) -> str:
    """The names, or the first of very many."""
    shown = 4
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class Override(NamedTuple):
    """What the caller of `open` said against the configuration and the tensors; None is silence."""

    bits: int | None = None
    group_size: int | None = None
    checkpoint_format: str | None = None


@dataclass(frozen=True)
class ModuleSpec:
    """How to read a module: the keyword arguments of the core's loaders."""

    bits: int
    group_size: int
    zero_points: str
    labelled: str
    symmetry: str

    def arguments(self) -> dict[str, Any]:
        """For `_core.load_gptq`, `_core.load_gptq_stacked` and `_core.validate`."""
        return dict(vars(self))


class ModuleInfo:
    """What a checkpoint holds under one module's name.

    Sizes come from the headers. What needs a look at g_idx, qzeros and scales (`act_order`,
    `symmetric`, `zero_points`, `supported`, `reason`, `warnings`) is read when it is first asked
    for.

    Attributes:
        name: Full path of the module, without the tensors' suffix.
        bits: Of a code.
        group_size: Input rows a group, -1 for one group.
        k: Input features, None where the tensors do not tell.
        n: Output features, None where the tensors do not tell.
        bytes: Of all its tensors as stored.
        bias: Whether it has a bias.
        checkpoint_format: As the configuration or the caller names it, "gptq" if nobody does.
    """

    __slots__ = (
        "_detail",
        "_examine",
        "bias",
        "bits",
        "bytes",
        "checkpoint_format",
        "group_size",
        "k",
        "n",
        "name",
    )

    def __init__(
        self,
        name: str,
        *,
        bits: int,
        group_size: int,
        k: int | None,
        n: int | None,
        nbytes: int,
        bias: bool,
        checkpoint_format: str,
        examine: Callable[[], dict[str, Any]],
    ) -> None:
        """Takes what the headers tell; `examine` validates, and raises MarlinqError."""
        self.name = name
        self.bits = bits
        self.group_size = group_size
        self.k = k
        self.n = n
        self.bytes = nbytes
        self.bias = bias
        self.checkpoint_format = checkpoint_format
        self._examine = examine
        self._detail: dict[str, Any] | None = None

    def _look(self) -> dict[str, Any]:
        if self._detail is None:
            try:
                self._detail = {**self._examine(), "reason": None}
            except MarlinqError as error:
                self._detail = {"reason": str(error)}
        return self._detail

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(N, K), as a framework's `Linear.weight`."""
        return self.n, self.k

    @property
    def supported(self) -> bool:
        """Whether marlinq can load it."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why it cannot be loaded, None if it can."""
        reason: str | None = self._look()["reason"]
        return reason

    @property
    def act_order(self) -> bool | None:
        """Whether g_idx is more than k // group_size; None if unsupported."""
        return self._look().get("act_order")

    @property
    def symmetric(self) -> bool | None:
        """Whether every zero point is 2^(bits-1); None if unsupported."""
        return self._look().get("symmetric")

    @property
    def zero_points(self) -> str | None:
        """How the zero points are stored, as found: "v1" or "v2"; None if unsupported."""
        return self._look().get("zero_points")

    @property
    def warnings(self) -> list[str]:
        """What a load of it would warn of."""
        return list(self._look().get("warnings", ()))

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = (
            *("name", "bits", "group_size", "k", "n", "bytes", "bias", "checkpoint_format"),
            *("act_order", "symmetric", "zero_points", "supported", "reason", "warnings"),
        )
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """Name, format and shape; reads nothing."""
        layout = f"{self.bits} bits, group {self.group_size}"
        return f"<ModuleInfo {self.name}: {layout}, {self.k} -> {self.n}>"


class ModuleReader:
    """Resolves modules by their tensors, the configuration and the caller's overrides."""

    def __init__(self, files: TensorFiles, config: QuantConfig, override: Override) -> None:
        """Reads nothing yet."""
        self._files = files
        self._config = config
        self._override = override

    def _shape(self, name: str, tensor: str, rank: int) -> tuple[int, ...] | None:
        entry = self._files.get(f"{name}.{tensor}")
        return entry.shape if entry is not None and len(entry.shape) == rank else None

    def _config_of(self, name: str) -> QuantConfig:
        config = self._config.for_module(name)
        values = {
            key: value for key, value in self._override._asdict().items() if value is not None
        }
        return replace(config, **values) if values else config

    def _bits(self, name: str, config: QuantConfig) -> int:
        """Bits by the tensors' shapes; the configuration chooses where they leave a choice."""
        if self._override.bits is not None:
            return self._override.bits
        configured = config.bits or _BITS_BY_LIKELIHOOD[0]
        qweight = self._shape(name, "qweight", 2)
        g_idx = self._shape(name, "g_idx", 1)
        qzeros = self._shape(name, "qzeros", 2)
        if qweight is None:
            return configured
        rows, n = qweight
        possible = [
            bits
            for bits in _BITS_BY_LIKELIHOOD
            if (g_idx is None or _ceil_div(g_idx[0] * bits, 32) == rows)
            and (qzeros is None or _ceil_div(n * bits, 32) == qzeros[1])
        ]
        return configured if configured in possible or not possible else possible[0]

    def _group_size(self, name: str, config: QuantConfig, k: int | None) -> int:
        """Group size by the rows of scales; the configuration chooses where they leave a choice."""
        configured = _USUAL_GROUPS[0] if config.group_size is None else config.group_size
        scales = self._shape(name, "scales", 2)
        if self._override.group_size is not None or scales is None or not k:
            return configured
        groups = scales[0]

        def fits(size: int) -> bool:
            return (groups == 1) if size == -1 else size > 0 and _ceil_div(k, size) == groups

        if fits(configured):
            return configured
        if groups == 1:
            return -1
        stored = self._files.get(f"{name}.g_idx")
        if stored is not None and stored.dtype == "I32" and stored.shape == (k,):
            g_idx = self._files.array(f"{name}.g_idx")
            size = int(np.argmax(g_idx != 0))
            if fits(size) and np.array_equal(g_idx, np.arange(k) // size):
                return size
        usual = next((size for size in _USUAL_GROUPS if fits(size)), None)
        if usual is not None:
            return usual
        return k // groups if groups and k % groups == 0 else configured

    def features(self, name: str, bits: int) -> tuple[int | None, int | None]:
        """(K, N) of a module by its tensors' shapes, None where they do not tell."""
        qweight = self._shape(name, "qweight", 2)
        g_idx = self._shape(name, "g_idx", 1)
        scales = self._shape(name, "scales", 2)
        k = (
            g_idx[0]
            if g_idx is not None
            else qweight[0] * 32 // bits
            if qweight is not None
            else None
        )
        n = scales[1] if scales is not None else qweight[1] if qweight is not None else None
        return k, n

    def spec(self, name: str) -> ModuleSpec:
        """How to read a module.

        Raises:
            UnsupportedError: The configuration names a packing that marlinq does not read.
        """
        config = self._config_of(name)
        refusal = config.refusal()
        if refusal is not None:
            raise UnsupportedError(f"{name}: {refusal}")
        for tensor, packing in FOREIGN_TENSORS.items():
            if f"{name}.qweight" not in self._files and f"{name}.{tensor}" in self._files:
                raise UnsupportedError(
                    f"{name}.{tensor}: packed for {packing}, expected GPTQ's qweight"
                )
        bits = self._bits(name, config)
        k, _ = self.features(name, bits)
        layout = config.checkpoint_format or "auto"
        try:
            labelled = zero_points_of(layout, bits)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
        symmetry = {None: "unknown", True: "symmetric", False: "asymmetric"}[config.symmetric]
        return ModuleSpec(
            bits=bits,
            group_size=self._group_size(name, config, k),
            zero_points="auto" if self._override.checkpoint_format is None else labelled,
            labelled=labelled,
            symmetry=symmetry,
        )

    def common_spec(self, names: Sequence[str]) -> ModuleSpec:
        """How to read several modules that one weight holds.

        Raises:
            InvalidArgumentError: They differ in bits or group size.
            UnsupportedError: As `spec`.
        """
        specs = {name: self.spec(name) for name in names}

        def effective(name: str) -> tuple[int, int]:
            spec = specs[name]
            k, _ = self.features(name, spec.bits)
            whole = k or spec.group_size
            return spec.bits, whole if spec.group_size == -1 else min(spec.group_size, whole)

        first = specs[names[0]]
        if len({effective(name) for name in names}) > 1:
            formats: dict[tuple[int, int], list[str]] = {}
            for name, spec in specs.items():
                formats.setdefault((spec.bits, spec.group_size), []).append(name)
            found = "; ".join(
                f"{_some(members)}: {bits} bits, group_size {group}"
                for (bits, group), members in formats.items()
            )
            raise InvalidArgumentError(f"{found}: expected the same for all modules of one weight")
        same_labels = len({spec.labelled for spec in specs.values()}) == 1
        same_symmetry = len({spec.symmetry for spec in specs.values()}) == 1
        if not same_labels:
            raise InvalidArgumentError(
                f"{_some(names)}: labelled with different checkpoint formats, expected one; open "
                "with checkpoint_format="
            )
        return first if same_symmetry else replace(first, symmetry="unknown")

    def present_tensors(self, name: str) -> list[str]:
        """Which of a module's tensors the checkpoint holds.

        Raises:
            InvalidFileError: One is missing that every module has.
        """
        for tensor in ("qweight", "scales"):
            if f"{name}.{tensor}" not in self._files:
                raise InvalidFileError(f"{name}.{tensor}: missing from the checkpoint")
        return [tensor for tensor in TENSORS if f"{name}.{tensor}" in self._files]

    def _host_tensor(self, name: str) -> _core.HostTensor:
        entry = self._files.entry(name)
        if entry.dtype not in _CORE_DTYPES:
            raise InvalidFileError(
                f"{name}: dtype {entry.dtype}, expected one of {', '.join(_CORE_DTYPES)}"
            )
        if len(entry.shape) not in (1, 2):
            raise InvalidFileError(f"{name}: {len(entry.shape)} dimensions, expected 1 or 2")
        return _core.HostTensor(self._files.view(name), _CORE_DTYPES[entry.dtype], entry.shape)

    def core_module(self, name: str) -> _core.Module:
        """A module's tensors for the core, as views into the mapped files.

        Raises:
            InvalidFileError: A tensor is missing, or one has a dtype or rank that has no place in
                GPTQ.
        """
        tensors = {
            tensor: self._host_tensor(f"{name}.{tensor}") for tensor in self.present_tensors(name)
        }
        return _core.Module(name, **tensors)

    def info(self, name: str) -> ModuleInfo:
        """What the headers tell of a module; never raises because of it."""
        config = self._config_of(name)
        bits = self._bits(name, config)
        k, n = self.features(name, bits)
        entries = [self._files.get(f"{name}.{tensor}") for tensor in (*TENSORS, *FOREIGN_TENSORS)]

        def examine() -> dict[str, Any]:
            spec = self.spec(name)
            return _core.validate([self.core_module(name)], **spec.arguments())

        return ModuleInfo(
            name,
            bits=bits,
            group_size=self._group_size(name, config, k),
            k=k,
            n=n,
            nbytes=sum(entry.end - entry.begin for entry in entries if entry is not None),
            bias=f"{name}.bias" in self._files,
            checkpoint_format=config.checkpoint_format or "gptq",
            examine=examine,
        )
