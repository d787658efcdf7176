"""How checkpoints name the parts of a mixture-of-experts block, and what config.json says of it."""

from collections.abc import Collection
from typing import Any, NamedTuple

from marlinq._config import text_config
from marlinq.errors import InvalidArgumentError, UnsupportedError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_CLAMPED_SWIGLU_LIMIT = 7.0

SHARED_NAMES = ("shared_expert", "shared_experts")


class Projections(NamedTuple):
    """Names of an expert's linears: those to fuse, gate first, and the one after the activation."""

    gate_up: list[str]
    down: str


_PROJECTIONS = (
    Projections(["gate_proj", "up_proj"], "down_proj"),
    Projections(["gate_up_proj"], "down_proj"),
    Projections(["w1", "w3"], "w2"),
)


def find_projections(names: Collection[str]) -> Projections | None:
    """The naming that an expert's children follow, or None."""
    for projections in _PROJECTIONS:
        if projections.down in names and all(name in names for name in projections.gate_up):
            return projections
    return None


def _model_type(config: dict[str, Any]) -> str | None:
    model_type = text_config(config).get("model_type") or config.get("model_type")
    return model_type if isinstance(model_type, str) else None


def activation_of(config: dict[str, Any]) -> str:
    """The activation between gate_up and down, by config.json.

    Raises:
        InvalidArgumentError: There is no config.json that tells.
        UnsupportedError: marlinq does not have it.
    """
    text = text_config(config)
    model_type = _model_type(config)
    if model_type == "gpt_oss":
        limit = text.get("swiglu_limit", _CLAMPED_SWIGLU_LIMIT)
        if limit != _CLAMPED_SWIGLU_LIMIT:
            raise UnsupportedError(
                f"config.json: swiglu_limit {limit}, expected {_CLAMPED_SWIGLU_LIMIT}"
            )
        return "clamped_swiglu"
    name = text.get("hidden_act") or text.get("hidden_activation") or config.get("hidden_act")
    if name is None:
        if model_type is None:
            raise InvalidArgumentError(
                "activation: config.json names neither hidden_act nor model_type; pass activation="
            )
        return "silu"  # every other model's default
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: hidden_act {name!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def router_weight_of(config: dict[str, Any], prefix: str) -> str:
    """Where the routing weight applies: "input" for Llama 4, else "output"."""
    model_type = _model_type(config)
    if model_type is None:
        return "input" if prefix.endswith("feed_forward") else "output"
    return "input" if model_type.startswith("llama4") else "output"
