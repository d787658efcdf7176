"""The quantisation configuration of a checkpoint, as far as it matters for reading the tensors.

All of it is a hint: what the tensors tell is believed first.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from marlinq._safetensors import read_json
from marlinq.errors import InvalidFileError

_GPTQ_FORMATS = ("gptq", "gptq_v2", "gptq_p")
_AUTO_ROUND = ("auto-round", "auto_round")
_AUTO_ROUND_GPTQ = "auto_round:auto_gptq"


@dataclass(frozen=True)
class DynamicRule:
    """One rule of `dynamic`: what holds for the modules whose path the pattern matches."""

    pattern: re.Pattern[str]
    overrides: dict[str, Any]


@dataclass(frozen=True)
class QuantConfig:
    """What the configuration says of a checkpoint, or of one module after `for_module`."""

    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    checkpoint_format: str | None = None
    packing_format: str | None = None
    pack_dtype: str | None = None
    lm_head: bool | None = None
    dynamic: tuple[DynamicRule, ...] = field(default=(), repr=False)

    def for_module(self, name: str) -> "QuantConfig":
        """What holds for one module: the first rule of `dynamic` that matches its path applies.

        A rule that excludes the module changes nothing: a module with packed tensors is quantised
        whatever the configuration says.
        """
        for rule in self.dynamic:
            if rule.pattern.match(name):
                return replace(self, **rule.overrides)
        return self

    def refusal(self) -> str | None:
        """Why a quantised module with this configuration cannot be read, or None."""
        method = self.method or "gptq"
        if method in _AUTO_ROUND:
            if self.checkpoint_format is None and self.packing_format != _AUTO_ROUND_GPTQ:
                return (
                    f"auto-round packing_format {self.packing_format}, expected {_AUTO_ROUND_GPTQ}"
                )
        elif method != "gptq":
            return f"quant_method {method}, expected gptq"
        layout = self.checkpoint_format or "gptq"
        if layout not in _GPTQ_FORMATS:
            return f"checkpoint_format {layout}, expected one of {', '.join(_GPTQ_FORMATS)}"
        if (self.pack_dtype or "int32") != "int32":
            return f"pack_dtype {self.pack_dtype}, expected int32"
        return None


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.lower()


# Field of QuantConfig: its names in the file, the preferred one first, and the type.
_FIELDS = {
    "method": (("quant_method", "method"), _text),
    "bits": (("bits",), _integer),
    "group_size": (("group_size",), _integer),
    "symmetric": (("sym",), _flag),
    "act_order": (("desc_act",), _flag),
    "checkpoint_format": (("checkpoint_format", "format"), _text),
    "packing_format": (("packing_format",), _text),
    "pack_dtype": (("pack_dtype",), _text),
    "lm_head": (("lm_head",), _flag),
}
_MODULE_FIELDS = ("bits", "group_size", "symmetric", "act_order", "checkpoint_format", "pack_dtype")


def _read_fields(source: str, table: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        keys, convert = _FIELDS[name]
        key = next((key for key in keys if table.get(key) is not None), None)
        if key is None:
            continue
        try:
            values[name] = convert(table[key])
        except (TypeError, ValueError, OverflowError) as error:
            expected = {_integer: "an integer", _flag: "true or false", _text: "a string"}[convert]
            raise InvalidFileError(
                f"{source}: {key}: {table[key]!r}, expected {expected}"
            ) from error
    return values


def _read_dynamic(source: str, table: dict[str, Any]) -> tuple[DynamicRule, ...]:
    dynamic = table.get("dynamic")
    if not dynamic:
        return ()
    if not isinstance(dynamic, dict):
        raise InvalidFileError(
            f"{source}: dynamic: {type(dynamic).__name__}, expected an object of patterns"
        )
    rules = []
    for key, overrides in dynamic.items():
        where = f"{source}: dynamic {key!r}"
        try:
            pattern = re.compile(key[2:] if key.startswith(("+:", "-:")) else key)
        except re.error as error:
            raise InvalidFileError(f"{where}: not a regular expression: {error}") from error
        if not isinstance(overrides or {}, dict):
            raise InvalidFileError(
                f"{where}: {type(overrides).__name__}, expected an object of overrides"
            )
        excluded = key.startswith("-:")
        values = {} if excluded else _read_fields(where, overrides or {}, _MODULE_FIELDS)
        rules.append(DynamicRule(pattern, values))
    return tuple(rules)


def _parse(source: str, table: dict[str, Any]) -> dict[str, Any]:
    values = _read_fields(source, table, ("method",))
    if values.get("method", "gptq") not in ("gptq", *_AUTO_ROUND):
        return values  # the keys of other methods have their own meaning
    values |= _read_fields(source, table, tuple(_FIELDS))
    if values.get("method") in _AUTO_ROUND:
        values.pop("checkpoint_format", None)  # its packing_format says it
    rules = _read_dynamic(source, table)
    if rules:
        values["dynamic"] = rules
    return values


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def read_config(directory: Path) -> tuple[dict[str, Any], QuantConfig]:
    """Reads config.json and quantize_config.json of a directory, each of which may be absent.

    Where both speak of quantisation, config.json is believed, and the other one fills the gaps.

    Returns:
        config.json as it is ({} if absent), and what both say of quantisation.

    Raises:
        InvalidFileError: A file is no JSON object, or a value has the wrong type.
    """
    model_path = directory / "config.json"
    quantize_path = directory / "quantize_config.json"
    model = read_json(model_path) if model_path.is_file() else {}
    values: dict[str, Any] = {}
    if quantize_path.is_file():
        values |= _parse(str(quantize_path), read_json(quantize_path))
    table = model.get("quantization_config") or text_config(model).get("quantization_config")
    if table is not None:
        if not isinstance(table, dict):
            raise InvalidFileError(
                f"{model_path}: quantization_config: {type(table).__name__}, expected an object"
            )
        values |= _parse(str(model_path), table)
    return model, QuantConfig(**values)
