"""Whole mixture-of-experts blocks against float64."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import Array, Expected, Layer, make_layer, stack_arrays
from marlinq import _core
from marlinq.errors import InvalidArgumentError
from support import MOE_BOUND, assert_close, normal

EXPERTS, HIDDEN, INNER = 6, 96, 64

_erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def clamped_swiglu(gate: Array, up: Array) -> Array:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "silu": lambda g, u: g * sigmoid(g) * u,
    "gelu": lambda g, u: 0.5 * g * (1 + _erf(g / math.sqrt(2))) * u,
    "gelu_tanh": lambda g, u: (
        0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    ),
    "clamped_swiglu": clamped_swiglu,
}


def make_experts(n: int, k: int, seed: int, **options: Any) -> list[Layer]:
    options = {"group_size": 32, "symmetric": False} | options
    return [
        make_layer(n, k, act_order=e % 2 == 0, seed=seed + e, **options) for e in range(EXPERTS)
    ]


GATE_UP = make_experts(2 * INNER, HIDDEN, 100, bias=True)
DOWN = make_experts(HIDDEN, INNER, 200, bias=True)
SHARED_GATE_UP = make_layer(160, HIDDEN, group_size=32, symmetric=False, bias=True, seed=300)
SHARED_DOWN = make_layer(HIDDEN, 80, group_size=32, symmetric=False, bias=True, seed=301)


@cache
def load_stacks(**options: Any) -> tuple[marlinq.ExpertStack, marlinq.ExpertStack]:
    stacks = (
        marlinq.load_gptq_stacked(**stack_arrays(layers), group_size=32, **options)
        for layers in (GATE_UP, DOWN)
    )
    return next(stacks), next(stacks)


@cache
def load_shared() -> tuple[marlinq.Linear, marlinq.Linear]:
    gate_up, down = (
        marlinq.load_gptq(**layer.arrays(), group_size=32)
        for layer in (SHARED_GATE_UP, SHARED_DOWN)
    )
    return gate_up, down


def run_expert(gate_up: Layer, down: Layer, x: Array, activation: str) -> Array:
    hidden = gate_up.expected(x).y
    gate, up = np.split(hidden, 2, axis=-1)
    return down.expected(ACTIVATIONS[activation](gate, up)).y


def expected_block(
    x: Array,
    ids: Array,
    weights: Array,
    *,
    activation: str = "silu",
    router_weight: str = "output",
    shared: Sequence[Layer] | None = None,
    shared_gate: Array | None = None,
    added: Sequence[Array] = (),
) -> Expected:
    """The block by its definition, in float64."""
    wide = x.astype(np.float64)
    y = np.zeros((len(x), HIDDEN))
    for token, (experts, shares) in enumerate(zip(ids, weights.astype(np.float64), strict=True)):
        row = wide[token : token + 1]
        for expert, share in zip(experts, shares, strict=True):
            if expert < 0:
                continue
            parts = GATE_UP[expert], DOWN[expert]
            if router_weight == "input":
                y[token] += run_expert(*parts, share * row, activation)[0]
            else:
                y[token] += share * run_expert(*parts, row, activation)[0]
    if shared is not None:
        output = run_expert(shared[0], shared[1], wide, activation)
        if shared_gate is not None:
            output *= sigmoid(wide @ shared_gate.astype(np.float64))[:, None]
        y += output
    for array in added:
        y += array.astype(np.float64)
    # Few rows are measured against their own values: a block does not cancel as one product may.
    return Expected(y, np.square(y))


def route_random(tokens: int, top_k: int, seed: int, lowest: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    ids = random.integers(lowest, EXPERTS, (tokens, top_k)).astype(np.int32)
    weights = random.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
    return ids, weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router_weight", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_activations(activation: str, router_weight: str, tokens: int, kernel: str) -> None:
    options = {"activation": activation, "router_weight": router_weight}
    block = marlinq.MoeBlock(*load_stacks(kernel=kernel), **options)
    x = normal((tokens, HIDDEN), seed=tokens)
    ids, weights = route_random(tokens, 2, seed=tokens)
    what = f"{options}, {tokens} tokens"
    assert_close(
        block(x, ids, weights), expected_block(x, ids, weights, **options), MOE_BOUND, what
    )


def test_clamping_happens() -> None:
    """Inputs large enough that gates exceed 7 and ups both limits."""
    block = marlinq.MoeBlock(*load_stacks(), activation="clamped_swiglu")
    x = 20 * normal((33, HIDDEN), seed=1)
    hidden = GATE_UP[0].expected(x).y
    assert hidden[:, :INNER].max() > 7
    assert np.abs(hidden[:, INNER:]).max() > 7
    ids, weights = route_random(33, 2, seed=1)
    expected = expected_block(x, ids, weights, activation="clamped_swiglu")
    assert_close(block(x, ids, weights), expected, MOE_BOUND, "clamped")


def test_activations_of_large_values_stay_finite() -> None:
    for activation in ACTIVATIONS:
        block = marlinq.MoeBlock(*load_stacks(), activation=activation)
        x = 1000 * normal((9, HIDDEN), seed=2)
        ids, weights = route_random(9, 2, seed=2)
        assert np.isfinite(block(x, ids, weights)).all(), activation


@pytest.mark.parametrize("top_k", range(1, 17))
def test_top_k(top_k: int) -> None:
    block = marlinq.MoeBlock(*load_stacks())
    x = normal((7, HIDDEN), seed=top_k)
    ids, weights = route_random(7, top_k, seed=top_k)
    what = f"top_k {top_k}"
    assert_close(block(x, ids, weights), expected_block(x, ids, weights), MOE_BOUND, what)


SITUATIONS = {
    "all on one": np.full((33, 2), 4),
    "empty experts": np.random.default_rng(1).choice([1, 5], (33, 2)),
    "not here": np.random.default_rng(2).integers(-1, EXPERTS, (33, 2)),
    "skewed": np.minimum(np.random.default_rng(3).geometric(0.6, (65, 3)) - 1, EXPERTS - 1),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_loads_of_experts(situation: str, ids_dtype: type, kernel: str) -> None:
    block = marlinq.MoeBlock(*load_stacks(kernel=kernel))
    ids = SITUATIONS[situation].astype(ids_dtype)
    x = normal((len(ids), HIDDEN), seed=3)
    _, weights = route_random(*ids.shape, seed=3)
    expected = expected_block(x, ids, weights)
    assert_close(block(x, ids, weights), expected, MOE_BOUND, situation)


def test_no_expert_here_gives_zeros() -> None:
    block = marlinq.MoeBlock(*load_stacks())
    out = np.full((4, HIDDEN), np.nan, np.float32)
    block(normal((4, HIDDEN), 1), np.full((4, 2), -1), np.ones((4, 2), np.float32), out=out)
    assert np.all(out == 0)


def test_no_tokens() -> None:
    block = marlinq.MoeBlock(*load_stacks())
    x = np.empty((0, HIDDEN), np.float32)
    result = block(x, np.empty((0, 2), np.int32), np.empty((0, 2), np.float32))
    assert result.shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_and_threads(dtype: Any, kernel: str) -> None:
    block = marlinq.MoeBlock(*load_stacks(kernel=kernel), shared_expert=load_shared())
    x = normal((33, HIDDEN), seed=4, dtype=dtype)
    ids, weights = route_random(33, 2, seed=4)
    own = marlinq.Context("cpu", 1)
    wide = np.empty((33, HIDDEN), np.float32)
    assert block(x, ids, weights, out=wide, context=own) is wide
    shared = (SHARED_GATE_UP, SHARED_DOWN)
    assert_close(wide, expected_block(x, ids, weights, shared=shared), MOE_BOUND, str(dtype))
    for threads in (1, 2, 5):
        result = block(x, ids, weights, context=marlinq.Context("cpu", threads))
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, wide.astype(dtype))  # one rounding, the same bits


def test_strided_input_and_output() -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=load_shared())
    frame = normal((20, HIDDEN + 9), seed=5)
    x = frame[::2, 4 : 4 + HIDDEN]
    ids, weights = route_random(20, 5, seed=5)
    target = np.full((12, HIDDEN + 5), 7, np.float32)
    block(x, ids[::2, 1:3], weights[::2, 1:3], out=target[1:11, 2 : 2 + HIDDEN])
    wanted = block(x.copy(), ids[::2, 1:3].copy(), weights[::2, 1:3].copy())
    np.testing.assert_array_equal(target[1:11, 2 : 2 + HIDDEN], wanted)
    target[1:11, 2 : 2 + HIDDEN] = 7
    assert np.all(target == 7)


@pytest.mark.parametrize("gate", [None, np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("router_weight", ["output", "input"])
def test_quantised_shared_expert(gate: Any, router_weight: str, kernel: str) -> None:
    vector = None if gate is None else (normal(HIDDEN, 6) / 8).astype(gate)
    block = marlinq.MoeBlock(
        *load_stacks(kernel=kernel),
        shared_expert=load_shared(),
        shared_gate=vector,
        router_weight=router_weight,
    )
    x = normal((33, HIDDEN), seed=6)
    ids, weights = route_random(33, 2, seed=6)
    expected = expected_block(
        x,
        ids,
        weights,
        router_weight=router_weight,
        shared=(SHARED_GATE_UP, SHARED_DOWN),
        shared_gate=None if vector is None else vector.astype(np.float32),
    )
    assert_close(block(x, ids, weights), expected, MOE_BOUND, f"gate {gate}")


@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert_as_a_callable(gated: bool) -> None:
    calls = []

    def shared(x: Array) -> Array:
        calls.append(x)
        return run_expert(SHARED_GATE_UP, SHARED_DOWN, x, "silu").astype(np.float32)

    vector = normal((1, HIDDEN), 7) / 8 if gated else None
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=shared, shared_gate=vector)
    x = normal((5, HIDDEN), seed=7)
    ids, weights = route_random(5, 2, seed=7)
    result = block(x, ids, weights)
    assert len(calls) == 1
    assert calls[0] is x
    expected = expected_block(
        x,
        ids,
        weights,
        shared=(SHARED_GATE_UP, SHARED_DOWN),
        shared_gate=None if vector is None else vector[0],
    )
    assert_close(result, expected, MOE_BOUND, f"gated {gated}")
    assert block.describe()["shared_expert"] == "callable"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shared_output_and_residual(dtype: Any, kernel: str) -> None:
    """Both are added in float32, before the one rounding."""
    block = marlinq.MoeBlock(*load_stacks(kernel=kernel))
    x = normal((33, HIDDEN), seed=11, dtype=dtype)
    ids, weights = route_random(33, 2, seed=11, lowest=-1)
    for residual_dtype in (dtype, np.float32):
        residual = normal((33, HIDDEN), seed=12, dtype=residual_dtype)
        shared = normal((33, HIDDEN), seed=13, dtype=np.float16)
        wide = np.empty((33, HIDDEN), np.float32)
        block(x, ids, weights, shared_output=shared, residual=residual, out=wide)
        expected = expected_block(x, ids, weights, added=[shared, residual])
        assert_close(wide, expected, MOE_BOUND, f"{dtype}, {residual_dtype}")
        narrow = block(x, ids, weights, shared_output=shared, residual=residual)
        np.testing.assert_array_equal(narrow, wide.astype(dtype))
        alone = np.empty((33, HIDDEN), np.float32)
        block(x, ids, weights, residual=residual, out=alone)
        assert_close(alone, expected_block(x, ids, weights, added=[residual]), MOE_BOUND, dtype)


def test_the_residual_may_be_the_output() -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=load_shared())
    x = normal((9, HIDDEN), seed=14)
    ids, weights = route_random(9, 2, seed=14)
    hidden = normal((9, HIDDEN + 3), seed=15)
    wanted = block(x, ids, weights, residual=hidden[:, 1:-2].copy())
    stream = hidden[:, 1:-2]
    assert block(x, ids, weights, residual=stream, out=stream) is stream
    np.testing.assert_array_equal(stream, wanted)


def test_an_error_of_the_callable_arrives() -> None:
    def shared(_x: Array) -> Array:
        raise KeyError("nothing there")

    block = marlinq.MoeBlock(*load_stacks(), shared_expert=shared)
    ids, weights = route_random(5, 2, seed=8)
    with pytest.raises(KeyError, match="nothing there"):
        block(normal((5, HIDDEN), 8), ids, weights)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros((4, HIDDEN), np.float32), "shared_output: 4 rows, expected at least 5"),
        (np.zeros((5, HIDDEN - 1), np.float32), "shared_output: 95 columns, expected 96"),
        (np.zeros((5, HIDDEN)), "shared_output: dtype float64"),
        ([1.0], "shared_output: list, expected"),
        (None, "shared_expert|shared_output"),
    ],
)
def test_refused_results_of_the_callable(returned: Any, message: str) -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=lambda _x: returned)
    ids, weights = route_random(5, 2, seed=8)
    with pytest.raises(InvalidArgumentError, match=message):
        block(normal((5, HIDDEN), 8), ids, weights)


def test_describe() -> None:
    block = marlinq.MoeBlock(
        *load_stacks(), shared_expert=load_shared(), shared_gate=np.ones(HIDDEN, np.float32)
    )
    description = block.describe()
    assert description["activation"] == "silu"
    assert description["router_weight"] == "output"
    assert description["shared_gate"] is True
    assert description["gate_up"]["n"] == 2 * INNER
    assert description["down"]["n"] == HIDDEN
    assert description["shared_expert"]["gate_up"]["n"] == 160
    assert (block.hidden_size, block.num_experts, block.device) == (HIDDEN, EXPERTS, "cpu")
    assert "6 experts, hidden 96, inner 64, silu, 4 bits" in repr(block)
    assert marlinq.MoeBlock(*load_stacks()).describe()["shared_expert"] is None


def test_context_is_used(context: marlinq.Context) -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=load_shared(), context=context)
    x = normal((33, HIDDEN), seed=9)
    ids, weights = route_random(33, 2, seed=9)
    first = block(x, ids, weights, context=context)
    grown = context.scratch_allocations
    assert grown > 0
    for rows in (33, 1, 7, 33):
        again = block(x[:rows], ids[:rows], weights[:rows], context=context)
        assert context.scratch_allocations == grown, "a size seen before allocated again"
        assert_close(again, Expected(first[:rows], np.square(first[:rows])), MOE_BOUND, rows)


def _load(n: int, k: int, count: int = EXPERTS) -> marlinq.ExpertStack:
    return marlinq.load_gptq_stacked(**stack_arrays([make_layer(n, k)] * count))


def test_parts_that_do_not_fit() -> None:
    gate_up, down = load_stacks()
    shared_gate_up, shared_down = load_shared()
    refusals: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((gate_up, _load(HIDDEN, 60)), {}, r"gate_up: n = 128, expected 2 \* k of down = 120"),
        ((gate_up, _load(64, INNER)), {}, "down: n = 64, expected k of gate_up = 96"),
        ((gate_up, _load(HIDDEN, INNER, 5)), {}, "down: 5 experts, expected 6 as in gate_up"),
        ((gate_up, down), {"activation": "relu"}, "activation: 'relu', expected one of silu"),
        ((gate_up, down), {"router_weight": "both"}, "router_weight: 'both', expected 'output'"),
        ((gate_up, down), {"shared_expert": (shared_down, shared_down)}, "shared gate_up: k = 80"),
        (
            (gate_up, down),
            {"shared_expert": (shared_gate_up, shared_gate_up)},
            r"shared gate_up: n = 160, expected 2 \* k of shared down = 192",
        ),
        (
            (gate_up, down),
            {"shared_expert": (shared_gate_up,)},
            "shared_expert: .*expected the pair",
        ),
        ((gate_up, down), {"shared_expert": (gate_up, down)}, "shared_expert: .*expected the pair"),
        ((gate_up, down), {"shared_gate": np.ones(HIDDEN)}, "shared_gate: given without"),
        (
            (gate_up, down),
            {"shared_expert": load_shared(), "shared_gate": np.ones(95)},
            "shared_gate: 95 elements, expected 96",
        ),
    ]
    for parts, options, message in refusals:
        with pytest.raises(InvalidArgumentError, match=message):
            marlinq.MoeBlock(*parts, **options)


@pytest.mark.parametrize("shared", [3, object(), "auto", [None, None]])
def test_shared_experts_that_are_none(shared: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="shared_expert: "):
        marlinq.MoeBlock(*load_stacks(), shared_expert=shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal((5, 95), 1)}, "x: 95 columns, expected 96"),
        ({"x": normal((5, HIDDEN), 1, np.float64)}, "x: dtype float64"),
        ({"topk_ids": np.zeros((4, 2), np.int32)}, "topk_ids: 4 rows, expected 5 as in x"),
        ({"topk_ids": np.zeros((5, 17), np.int32)}, "topk_ids: top_k = 17, expected 1 to 16"),
        ({"topk_ids": np.zeros((5, 0), np.int32)}, "topk_ids: top_k = 0, expected 1 to 16"),
        ({"topk_ids": np.zeros((5, 2), np.float32)}, "topk_ids: dtype float32, expected int32"),
        ({"topk_ids": np.full((5, 2), EXPERTS)}, r"topk_ids: element \[0, 0\] is 6"),
        ({"topk_ids": np.full((5, 2), -2)}, r"topk_ids: element \[0, 0\] is -2"),
        ({"topk_ids": np.full((5, 2), 2**33)}, r"topk_ids: element \[0, 0\] is 8589934592"),
        ({"topk_weights": np.ones((5, 3), np.float32)}, "topk_weights: 3 columns, expected 2"),
        ({"topk_weights": np.ones((4, 2), np.float32)}, "topk_weights: 4 rows, expected"),
        ({"topk_weights": np.ones((5, 2), np.float16)}, "topk_weights: dtype float16, expected"),
        ({"residual": np.ones((4, HIDDEN), np.float32)}, "residual: 4 rows, expected at least 5"),
        ({"residual": np.ones((5, 95), np.float32)}, "residual: 95 columns, expected 96"),
        (
            {"residual": np.ones((5, HIDDEN), np.float16)},
            "residual: dtype float16, expected the input's float32",
        ),
        ({"residual": 3}, "residual: int, expected a numpy array"),
        (
            {"shared_output": np.ones((5, HIDDEN), np.float32)},
            "shared_output: given, but the block runs a shared expert itself",
        ),
        ({"out": np.ones((4, HIDDEN), np.float32)}, "out: 4 rows, expected"),
        ({"out": np.ones((5, HIDDEN), np.float16)}, "out: dtype float16, expected the input's"),
        ({"out": np.ones((5, HIDDEN - 1), np.float32)}, "out: 95 columns, expected 96"),
    ],
)
def test_refused_input(change: dict[str, Any], message: str) -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=load_shared())
    ids, weights = route_random(5, 2, seed=10)
    arguments = {"x": normal((5, HIDDEN), 10), "topk_ids": ids, "topk_weights": weights}
    with pytest.raises(InvalidArgumentError, match=message):
        block(**(arguments | change))
    assert np.isfinite(block(**arguments)).all()


def test_two_shared_experts_are_refused() -> None:
    block = marlinq.MoeBlock(*load_stacks(), shared_expert=lambda x: x)
    ids, weights = route_random(5, 2, seed=10)
    x = normal((5, HIDDEN), 10)
    with pytest.raises(InvalidArgumentError, match="shared_output: given, but the block runs"):
        block(x, ids, weights, shared_output=x)


def test_timing_in_turn(context: marlinq.Context) -> None:
    """What bench calls: blocks and routings in turn, the last call's output stays."""
    handles = [marlinq.MoeBlock(*load_stacks(), activation=a)._handle for a in ("silu", "gelu")]
    x = normal((5, HIDDEN), 16)
    weights = np.full((5, 2), 0.5, np.float32)
    routings = [np.full((5, 2), expert, np.int32) for expert in range(3)]
    out = np.empty((5, HIDDEN), np.float32)
    seconds = _core.time_blocks(context, handles, x, routings, weights, out, first=2, count=3)
    assert seconds > 0
    wanted = marlinq.MoeBlock(*load_stacks())(x, routings[1], weights)
    np.testing.assert_array_equal(out, wanted)  # call 4: the first block, the second routing
    for blocks, ids, options, message in (
        ([], routings, {"first": 0, "count": 1}, "time_blocks: 0 handles, first 0, count 1"),
        (handles, routings, {"first": -1, "count": 1}, "2 handles, first -1, count 1"),
        (handles, routings, {"first": 0, "count": 0}, "first 0, count 0, expected at least"),
        (handles, [], {"first": 0, "count": 1}, "time_blocks: no topk_ids, expected at least"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            _core.time_blocks(context, blocks, x, ids, weights, out, **options)
