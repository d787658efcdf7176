"""Checkpoints that another program wrote, against numbers that another program computed."""

import math
from functools import cache, partial

import marlinq
import numpy as np
import pytest
from gptq_writer import Array
from marlinq import reference
from safetensors.numpy import load_file
from support import DATA, tolerance

MODULE_BOUND = tolerance("fixture", "linear_float32")
BLOCK_BOUND = tolerance("fixture", "moe_float32")

CHECKPOINTS = sorted(path.parent.name for path in DATA.glob("*/expected.safetensors"))


@cache
def expected_of(name: str) -> dict[str, Array]:
    return load_file(DATA / name / "expected.safetensors")


def _products() -> list[tuple[str, str, int]]:
    """(checkpoint, module, rows) of every expected product."""
    found = []
    for checkpoint in CHECKPOINTS:
        modules = {info.name for info in marlinq.open(DATA / checkpoint).modules()}
        for tensor in expected_of(checkpoint):
            module, _, last = tensor.rpartition(".")
            if module in modules and last.startswith("y"):
                found.append((checkpoint, module, int(last[1:])))
    return sorted(found)


def relative(result: Array, expected: Array) -> float:
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


PRODUCTS = _products()


def test_data_covers_the_formats() -> None:
    traits = set()
    for checkpoint in CHECKPOINTS:
        for info in marlinq.open(DATA / checkpoint).modules():
            assert info.supported, info.reason
            traits |= {info.bits, info.group_size, ("act_order", info.act_order)}
            traits |= {("symmetric", info.symmetric), ("bias", info.bias)}
    flags = {
        (name, value) for name in ("act_order", "symmetric", "bias") for value in (True, False)
    }
    assert traits == {4, 8, 64, 128} | flags
    assert len({(checkpoint, module) for checkpoint, module, _ in PRODUCTS}) >= 15


@pytest.mark.parametrize(("checkpoint", "module", "rows"), PRODUCTS)
def test_module(checkpoint: str, module: str, rows: int, kernel: str) -> None:
    layer = marlinq.open(DATA / checkpoint).linear(module, compute="float32", kernel=kernel)
    assert layer.describe()["kernel"] == kernel
    expected = expected_of(checkpoint)
    error = relative(layer(expected[f"{module}.x{rows}"]), expected[f"{module}.y{rows}"])
    assert error <= MODULE_BOUND, f"{module}, {rows} rows: error {error:.2e}"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_fused_modules_are_the_modules_side_by_side(checkpoint: str, kernel: str) -> None:
    opened = marlinq.open(DATA / checkpoint)
    names = [
        info.name
        for info in opened.modules()
        if info.name.startswith(("model.layers.0.self_attn", "encoder.layer.0.attention.self"))
    ]
    if not names:
        names = [f"model.layers.0.mlp.experts.0.{part}_proj" for part in ("gate", "up")]
    fused = opened.linear(names, kernel=kernel)
    x = np.random.default_rng(5).standard_normal((5, fused.in_features)).astype(np.float32)
    apart = np.concatenate([opened.linear(name, kernel=kernel)(x) for name in names], axis=1)
    np.testing.assert_array_equal(fused(x), apart)


@pytest.mark.parametrize(
    "module", [f"{c}:{t[:-2]}" for c in CHECKPOINTS for t in expected_of(c) if t.endswith(".W")]
)
def test_reference_dequantises_bit_for_bit(module: str) -> None:
    checkpoint, name = module.split(":")
    dense = marlinq.open(DATA / checkpoint).reference(name).dequantize(np.float32)
    np.testing.assert_array_equal(dense, expected_of(checkpoint)[f"{name}.W"])


@pytest.mark.parametrize(("checkpoint", "module", "rows"), PRODUCTS)
def test_reference_product(checkpoint: str, module: str, rows: int) -> None:
    expected = expected_of(checkpoint)
    y = marlinq.open(DATA / checkpoint).reference(module).product(expected[f"{module}.x{rows}"]).y
    # Both sums are float64, and the expected one was rounded to float32.
    error = relative(y, expected[f"{module}.y{rows}"].astype(np.float64))
    assert error <= 6e-8, f"{module}, {rows} rows: error {error:.2e}"


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_moe_block(rows: int, threads: int, ids_dtype: type, kernel: str) -> None:
    prefix = "model.layers.0.mlp"
    block = marlinq.open(DATA / "qwen3moe-w4-g128-sym").moe(
        prefix, compute="float32", kernel=kernel
    )
    parts = block.describe()
    assert (parts["activation"], parts["router_weight"]) == ("silu", "output")
    assert parts["gate_up"]["kernel"] == parts["down"]["kernel"] == kernel
    expected = expected_of("qwen3moe-w4-g128-sym")
    result = block(
        expected[f"{prefix}.x{rows}"],
        expected[f"{prefix}.topk_ids{rows}"].astype(ids_dtype),
        expected[f"{prefix}.topk_weights{rows}"],
        context=marlinq.Context("cpu", threads),
    )
    error = relative(result, expected[f"{prefix}.y{rows}"])
    assert error <= BLOCK_BOUND, f"{rows} rows: error {error:.2e}"


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_routing(rows: int) -> None:
    expected = expected_of("qwen3moe-w4-g128-sym")
    prefix = "model.layers.0.mlp"
    logits = expected[f"{prefix}.router_logits{rows}"]
    ids, weights = marlinq.route(logits, 2)
    np.testing.assert_array_equal(ids, expected[f"{prefix}.topk_ids{rows}"])
    # The expected softmax saw the logits before they were rounded to float32: the difference of two
    # of them, an exponent, moves by up to one unit; the weights are rounded themselves.
    unit = float(np.finfo(np.float32).eps)
    tolerance = unit * (1 + float(np.abs(logits).max()))
    np.testing.assert_allclose(weights, expected[f"{prefix}.topk_weights{rows}"], rtol=tolerance)


def test_router_logits_from_the_stored_router() -> None:
    expected = expected_of("qwen3moe-w4-g128-sym")
    words = marlinq.open(DATA / "qwen3moe-w4-g128-sym").tensor("model.layers.0.mlp.gate.weight")
    assert words.dtype == np.uint16
    router = reference.widen(words)
    logits = expected["model.layers.0.mlp.x33"] @ router.T
    assert relative(logits, expected["model.layers.0.mlp.router_logits33"]) <= MODULE_BOUND


def test_minilm_encoder_end_to_end() -> None:
    """Three whole layers of the pretrained model, attention and LayerNorm in numpy."""
    opened = marlinq.open(DATA / "minilm-w4-g128-sym")
    load = partial(opened.linear, compute="float32")
    expected = expected_of("minilm-w4-g128-sym")
    mask = expected["encoder.attention_mask"].astype(bool)
    hidden = expected["encoder.hidden_in"]
    erf = np.vectorize(math.erf)

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-12)
        return scaled * opened.tensor(f"{name}.weight") + opened.tensor(f"{name}.bias")

    for layer in range(3):
        prefix = f"encoder.layer.{layer}"
        attention = f"{prefix}.attention"
        qkv = load([f"{attention}.self.{part}" for part in ("query", "key", "value")])
        # [batch, T, 3 * 384] -> three of [batch, heads, T, 32]
        q, k, v = qkv(hidden).reshape(*hidden.shape[:2], 3, 12, 32).transpose(2, 0, 3, 1, 4)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(32)
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = (shares @ v).transpose(0, 2, 1, 3).reshape(hidden.shape)
        mixed = load(f"{attention}.output.dense")(mixed)
        hidden = norm(hidden + mixed, f"{attention}.output.LayerNorm")
        inner = load(f"{prefix}.intermediate.dense")(hidden)
        inner = (0.5 * inner * (1 + erf(inner / math.sqrt(2)))).astype(np.float32)
        outer = load(f"{prefix}.output.dense")(inner)
        hidden = norm(hidden + outer, f"{prefix}.output.LayerNorm").astype(np.float32)
    # 18 float32 products, 6 LayerNorms and 3 softmaxes in float32, each around 2e-7.
    assert relative(hidden[mask], expected["encoder.hidden_out"][mask]) <= 5e-6
