"""Mixture-of-experts blocks of checkpoints, by the names that each model family uses."""

from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import (
    Array,
    Expected,
    Layer,
    Tensor,
    floats,
    make_layer,
    round_to,
    write_checkpoint,
)
from marlinq import _core
from marlinq.errors import InvalidArgumentError, MarlinqError, UnsupportedError
from support import MOE_BOUND, assert_close, normal

EXPERTS, HIDDEN, INNER = 4, 64, 96

Expert = tuple[Layer, Layer, Layer]
"""gate, up, down"""


def make_expert(seed: int, inner: int = INNER, *, bias: bool = False) -> Expert:
    options: dict[str, Any] = {
        "group_size": 32,
        "symmetric": seed % 2 == 0,
        "act_order": seed % 3 == 0,
        "bias": bias,
    }
    return (
        make_layer(inner, HIDDEN, seed=seed, **options),
        make_layer(inner, HIDDEN, seed=seed, **options),  # gate and up share their permutation
        make_layer(HIDDEN, inner, seed=seed + 1000, **options),
    )


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(gate: Array, up: Array) -> Array:
    return gate * sigmoid(gate) * up


def clamped(gate: Array, up: Array) -> Array:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


def run(expert: Expert, x: Array, activation: Any = silu) -> Array:
    gate, up, down = expert
    return down.expected(activation(gate.expected(x).y, up.expected(x).y)).y


def routed(x: Array, ids: Array, weights: Array, experts: list[Expert], **options: Any) -> Array:
    """Sum of the experts' outputs, each times its weight."""
    outputs = np.array([run(expert, x.astype(np.float64), **options) for expert in experts])
    rows = np.arange(len(x))[:, None]
    return (outputs[ids, rows] * weights.astype(np.float64)[..., None]).sum(1)


def inputs(tokens: int = 17, top_k: int = 2) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(tokens)
    x = normal((tokens, HIDDEN), seed=tokens)
    ids = random.integers(0, EXPERTS, (tokens, top_k))
    weights = random.uniform(0.1, 0.9, (tokens, top_k)).astype(np.float32)
    return x, ids, weights


def names_of(prefix: str, parts: tuple[str, str, str], expert: Expert) -> dict[str, Layer]:
    return {f"{prefix}.{part}": layer for part, layer in zip(parts, expert, strict=True)}


QWEN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
ROUTED = [make_expert(seed) for seed in range(EXPERTS)]


def write(
    directory: Path,
    prefix: str,
    *,
    parts: tuple[str, str, str] = QWEN,
    experts: list[Expert] = ROUTED,
    modules: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    others: dict[str, Tensor] | None = None,
) -> marlinq.Checkpoint:
    written: dict[str, Any] = dict(modules or {})
    for index, expert in enumerate(experts):
        written |= names_of(f"{prefix}.experts.{index}", parts, expert)
    return marlinq.open(write_checkpoint(directory, written, config=config, others=others))


def check(block: marlinq.MoeBlock, y: Array, x: Array, ids: Array, weights: Array) -> None:
    assert_close(block(x, ids, weights), Expected(y, np.square(y)), MOE_BOUND, f"{len(x)} tokens")


@pytest.mark.parametrize(
    ("prefix", "parts", "config"),
    [
        (
            "model.layers.3.block_sparse_moe",
            MIXTRAL,
            {"model_type": "mixtral", "hidden_act": "silu"},
        ),
        ("model.layers.3.mlp", QWEN, {"model_type": "qwen3_moe", "hidden_act": "silu"}),
        (
            "model.language_model.layers.3.mlp",
            QWEN,
            {"model_type": "qwen3_5_moe", "text_config": {"hidden_act": "silu"}},
        ),
        ("model.layers.3.mlp", QWEN, {"model_type": "olmoe"}),
    ],
)
def test_plain_families(
    tmp_path: Path, prefix: str, parts: tuple[str, str, str], config: dict[str, Any]
) -> None:
    block = write(tmp_path, prefix, parts=parts, config=config).moe(prefix)
    assert (block.num_experts, block.hidden_size) == (EXPERTS, HIDDEN)
    x, ids, weights = inputs()
    check(block, routed(x, ids, weights, ROUTED), x, ids, weights)


def test_each_projection_is_what_its_name_says(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "m", parts=MIXTRAL)
    stack = checkpoint.expert_stack("m.experts", ["w1", "w3"])
    assert stack.n_per_expert == 2 * INNER
    x = normal((3, HIDDEN), 1)
    for index in range(EXPERTS):
        apart = [checkpoint.linear(f"m.experts.{index}.{part}")(x) for part in ("w1", "w3")]
        np.testing.assert_array_equal(stack[index](x), np.concatenate(apart, 1))
    single = checkpoint.expert_stack("m.experts", "w2")
    np.testing.assert_array_equal(
        single[1](normal((3, INNER), 2)), checkpoint.linear("m.experts.1.w2")(normal((3, INNER), 2))
    )


SHARED = make_expert(50, 160)
SHARED_CASES = [
    ("shared_expert", None),
    ("shared_expert", "F16"),
    ("shared_expert", "BF16"),
    ("shared_expert", "F32"),
    ("shared_expert", "quantised"),
    ("shared_experts", None),
]


@pytest.mark.parametrize(("name", "gate"), SHARED_CASES)
def test_shared_expert(tmp_path: Path, name: str, gate: str | None) -> None:
    """Qwen2-MoE with its gate, DeepSeek without."""
    prefix = "model.layers.1.mlp"
    modules: dict[str, Any] = names_of(f"{prefix}.{name}", QWEN, SHARED)
    others: dict[str, Tensor] = {}
    vector = None
    if gate == "quantised":
        layer = make_layer(1, HIDDEN, group_size=32, seed=60)
        modules[f"{prefix}.shared_expert_gate"] = layer
        vector = layer.dense()[0]
    elif gate is not None:
        vector = round_to(normal((1, HIDDEN), 61) / 8, gate)
        others[f"{prefix}.shared_expert_gate.weight"] = floats(vector, gate)
    config = {"model_type": "qwen2_moe", "hidden_act": "silu"}
    checkpoint = write(tmp_path, prefix, modules=modules, others=others, config=config)
    x, ids, weights = inputs()
    y = routed(x, ids, weights, ROUTED)
    shared = run(SHARED, x.astype(np.float64))
    if vector is not None:
        shared *= sigmoid(x.astype(np.float64) @ vector.reshape(-1))[:, None]
    block = checkpoint.moe(prefix)
    assert block.describe()["shared_gate"] is (gate is not None)
    check(block, y + shared, x, ids, weights)
    # Left out when asked to.
    check(checkpoint.moe(prefix, shared_expert=None), y, x, ids, weights)


def test_shared_expert_that_is_not_quantised(tmp_path: Path) -> None:
    prefix = "model.layers.1.mlp"
    others = {
        f"{prefix}.shared_expert.{part}.weight": Tensor("F16", np.zeros((8, 8), np.float16))
        for part in QWEN
    }
    vector = normal((1, HIDDEN), 61) / 8
    others[f"{prefix}.shared_expert_gate.weight"] = floats(vector, "F32")
    checkpoint = write(tmp_path, prefix, others=others, config={"hidden_act": "silu"})
    with pytest.raises(InvalidArgumentError, match="gate_proj: not quantised; pass shared_expert="):
        checkpoint.moe(prefix)
    x, ids, weights = inputs()
    block = checkpoint.moe(prefix, shared_expert=lambda x: x)
    share = sigmoid(x.astype(np.float64) @ vector[0].astype(np.float64))[:, None]
    check(block, routed(x, ids, weights, ROUTED) + share * x, x, ids, weights)
    with pytest.raises(InvalidArgumentError, match=r"shared_expert: 'none', expected .auto."):
        checkpoint.moe(prefix, shared_expert="none")


def test_gpt_oss(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp"
    experts = [make_expert(seed, bias=True) for seed in range(EXPERTS)]
    others = {
        f"{prefix}.router.weight": Tensor("BF16", np.zeros((EXPERTS, HIDDEN), np.uint16)),
        f"{prefix}.router.bias": Tensor("BF16", np.zeros(EXPERTS, np.uint16)),
    }
    config = {"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_limit": 7.0}
    block = write(tmp_path, prefix, experts=experts, others=others, config=config).moe(prefix)
    assert block.describe()["activation"] == "clamped_swiglu"
    x, ids, weights = inputs()
    x *= 3
    assert experts[0][0].expected(x).y.max() > 7
    check(block, routed(x, ids, weights, experts, activation=clamped), x, ids, weights)


def test_a_limit_that_is_not_seven_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "swiglu_limit": 10.0}
    checkpoint = write(tmp_path, "m.mlp", config=config)
    with pytest.raises(UnsupportedError, match=r"swiglu_limit 10\.0, expected 7\.0"):
        checkpoint.moe("m.mlp")


def test_llama_4(tmp_path: Path) -> None:
    prefix = "language_model.model.layers.0.feed_forward"
    modules = names_of(f"{prefix}.shared_expert", QWEN, SHARED)
    config = {
        "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", "hidden_act": "silu"},
    }
    block = write(tmp_path, prefix, modules=modules, config=config).moe(prefix)
    assert block.describe()["router_weight"] == "input"
    x, ids, weights = inputs(top_k=1)
    wide = x.astype(np.float64) * weights.astype(np.float64)
    y = np.array([run(ROUTED[expert], wide)[t] for t, (expert,) in enumerate(ids)])
    check(block, y + run(SHARED, x.astype(np.float64)), x, ids, weights)


def test_fused_gate_up(tmp_path: Path) -> None:
    """`experts.E.gate_up_proj`: 2 I columns, the gate's first."""
    fused = [make_layer(2 * INNER, HIDDEN, group_size=32, seed=e) for e in range(EXPERTS)]
    down = [make_layer(HIDDEN, INNER, group_size=32, seed=90 + e) for e in range(EXPERTS)]
    modules: dict[str, Any] = {}
    for index in range(EXPERTS):
        modules[f"m.mlp.experts.{index}.gate_up_proj"] = fused[index]
        modules[f"m.mlp.experts.{index}.down_proj"] = down[index]
    config = {"hidden_act": "silu"}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, modules, config=config))
    x, ids, weights = inputs()
    hidden = [layer.expected(x).y for layer in fused]
    outputs = np.array(
        [d.expected(silu(h[:, :INNER], h[:, INNER:])).y for h, d in zip(hidden, down, strict=True)]
    )
    y = (outputs[ids, np.arange(len(x))[:, None]] * weights[..., None].astype(np.float64)).sum(1)
    check(checkpoint.moe("m.mlp"), y, x, ids, weights)


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "swish"}, "silu"),
        ({"text_config": {"hidden_act": "gelu"}, "hidden_act": "silu"}, "gelu"),
        ({"model_type": "deepseek_v3"}, "silu"),
    ],
)
def test_activation_by_the_configuration(
    tmp_path: Path, config: dict[str, Any], activation: str
) -> None:
    checkpoint = write(tmp_path, "m.mlp", config=config)
    assert checkpoint.moe("m.mlp").describe()["activation"] == activation
    assert checkpoint.moe("m.mlp", activation="silu").describe()["activation"] == "silu"


def test_activations_that_are_not_known(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "a", "m.mlp", config={"hidden_act": "relu2"})
    with pytest.raises(UnsupportedError, match="hidden_act 'relu2', expected one of silu"):
        checkpoint.moe("m.mlp")
    checkpoint = write(tmp_path / "b", "m.mlp")
    with pytest.raises(InvalidArgumentError, match=r"activation: config\.json names neither"):
        checkpoint.moe("m.mlp")
    assert checkpoint.moe("m.mlp", activation="gelu").describe()["activation"] == "gelu"


def test_router_weight_can_be_chosen(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "m.mlp", config={"hidden_act": "silu"})
    assert checkpoint.moe("m.mlp", router_weight="input").describe()["router_weight"] == "input"
    with pytest.raises(InvalidArgumentError, match="router_weight: 'x'"):
        checkpoint.moe("m.mlp", router_weight="x")


def test_nothing_is_loaded_before_all_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a stack may take seconds, and memory of a GPU."""

    def fail(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("a part was loaded")

    monkeypatch.setattr(_core, "load_gptq", fail)
    monkeypatch.setattr(_core, "load_gptq_stacked", fail)
    config = {"hidden_act": "silu"}
    sound = write(tmp_path / "a", "m.mlp", config=config)
    for options, message in (
        ({"activation": "relu"}, "activation: 'relu', expected one of silu"),
        ({"router_weight": "x"}, "router_weight: 'x', expected 'output'"),
        ({"shared_expert": 3}, "shared_expert: int, expected the pair"),
        ({"shared_expert": "none"}, "shared_expert: 'none', expected"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            sound.moe("m.mlp", **options)
    down = {"m.mlp.experts.2.down_proj": make_layer(HIDDEN, INNER, bits=8, group_size=32)}
    experts = {
        name: layer
        for index, expert in enumerate(ROUTED)
        for name, layer in names_of(f"m.mlp.experts.{index}", QWEN, expert).items()
    }
    checkpoint = marlinq.open(write_checkpoint(tmp_path / "b", experts | down, config=config))
    with pytest.raises(InvalidArgumentError, match=r"experts\.2\.down_proj: 8 bits"):
        checkpoint.moe("m.mlp")
    gate, up, _ = SHARED
    shared = names_of("m.mlp.shared_expert", QWEN, (gate, up, gate))
    foreign = {"m.mlp.shared_expert.down_proj": {"weight_packed": SHARED[2].tensors()["qweight"]}}
    checkpoint = write(tmp_path / "c", "m.mlp", modules=shared | foreign, config=config)
    with pytest.raises(UnsupportedError, match=r"shared_expert\.down_proj"):
        checkpoint.moe("m.mlp")
    with pytest.raises(MarlinqError, match="cuda:99"):
        sound.moe("m.mlp", device="cuda:99")


def test_prefixes_without_experts(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "model.layers.1.mlp", config={"hidden_act": "silu"})
    for call in (
        lambda: checkpoint.moe("model.layers.2.mlp"),
        lambda: checkpoint.expert_stack("model.layers.2.mlp.experts", "down_proj"),
    ):
        with pytest.raises(
            InvalidArgumentError,
            match=r"layers\.2\.mlp\.experts: no experts here; near names: model\.layers\.1\.mlp",
        ):
            call()
    with pytest.raises(InvalidArgumentError, match=r"experts\.0\.w2: no such module"):
        checkpoint.expert_stack("model.layers.1.mlp.experts", "w2")
    with pytest.raises(InvalidArgumentError, match="names: an empty list"):
        checkpoint.expert_stack("model.layers.1.mlp.experts", [])


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    modules: dict[str, Any] = {}
    for index in (0, 1, 3):
        modules |= names_of(f"m.experts.{index}", QWEN, ROUTED[index])
    checkpoint = marlinq.open(write_checkpoint(tmp_path, modules))
    with pytest.raises(InvalidArgumentError, match=r"m\.experts\.2: missing; expected .* 0 to 3"):
        checkpoint.expert_stack("m.experts", "down_proj")


def test_an_expert_without_a_projection_is_named(tmp_path: Path) -> None:
    modules: dict[str, Any] = {}
    for index in range(3):
        modules |= names_of(f"m.experts.{index}", QWEN, ROUTED[index])
    del modules["m.experts.1.up_proj"]
    others = {"m.experts.1.up_proj.weight": Tensor("F16", np.zeros((INNER, HIDDEN), np.float16))}
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, modules, others=others, config={"hidden_act": "silu"})
    )
    with pytest.raises(InvalidArgumentError, match=r"m\.experts\.1\.up_proj: not quantised"):
        checkpoint.moe("m")


def test_projections_of_other_names(tmp_path: Path) -> None:
    modules = {f"m.experts.{e}.{part}": ROUTED[e][0] for e in range(2) for part in ("wi", "wo")}
    checkpoint = marlinq.open(write_checkpoint(tmp_path, modules, config={"hidden_act": "silu"}))
    with pytest.raises(UnsupportedError, match=r"experts\.0: holds wi, wo; expected gate_proj"):
        checkpoint.moe("m")


def test_options_reach_every_part(tmp_path: Path, kernel: str) -> None:
    modules = names_of("m.mlp.shared_expert", QWEN, SHARED)
    checkpoint = write(tmp_path, "m.mlp", modules=modules, config={"hidden_act": "silu"})
    block = checkpoint.moe("m.mlp", kernel=kernel, batch_invariant=True, compute="float32")
    parts = block.describe()
    for part in (parts["gate_up"], parts["down"], *parts["shared_expert"].values()):
        assert (part["kernel"], part["batch_invariant"]) == (kernel, True)


def test_experts_in_many_shards(tmp_path: Path) -> None:
    """Two digits, so that the order of names is not the order of numbers."""
    layers = [make_layer(32, 32, group_size=32, seed=e) for e in range(12)]
    for index, layer in enumerate(layers):
        write_checkpoint(
            tmp_path, {f"m.experts.{index}.down_proj": layer}, file=f"{index}.safetensors"
        )
    stack = marlinq.open(tmp_path).expert_stack("m.experts", "down_proj", compute="float32")
    assert len(stack) == 12
    for linear, layer in zip(stack, layers, strict=True):
        np.testing.assert_array_equal(linear(np.eye(32, dtype=np.float32)), layer.dense().T)
