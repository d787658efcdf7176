"""Stacks of experts: loading, views, both phases, against one layer at a time."""

from dataclasses import replace
from functools import cache
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import Array, Expected, Layer, make_layer, stack_arrays
from marlinq.errors import InvalidArgumentError
from support import LINEAR_BOUND, assert_close, normal

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def make_experts(count: int = 5, n: int = 96, k: int = 160, **options: Any) -> list[Layer]:
    """Experts of one shape; every second one has act-order, as stacks in the world mix both."""
    options = {"group_size": 64, "symmetric": False, "bias": True} | options
    return [
        make_layer(n, k, act_order=expert % 2 == 1, seed=expert, **options)
        for expert in range(count)
    ]


EXPERTS = make_experts()


@cache
def load(**options: Any) -> marlinq.ExpertStack:
    """The stack of EXPERTS."""
    return load_experts(EXPERTS, **options)


def load_experts(experts: list[Layer], **options: Any) -> marlinq.ExpertStack:
    first = experts[0]
    return marlinq.load_gptq_stacked(
        **stack_arrays(experts), bits=first.bits, group_size=first.group_size, **options
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts(bits: int, symmetric: bool, kernel: str) -> None:
    experts = make_experts(4, bits=bits, symmetric=symmetric)
    stack = load_experts(experts, kernel=kernel)
    assert stack.describe()["kernel"] == kernel
    x = normal((7, 160), seed=1)
    for index, layer in enumerate(experts):
        what = f"expert {index}, {bits} bits"
        assert_close(stack.expert(index)(x), layer.expected(x), LINEAR_BOUND, what)


def test_an_expert_is_the_same_layer_loaded_alone(kernel: str) -> None:
    stack = load(kernel=kernel)
    x = normal((7, 160), seed=2)
    for index, layer in enumerate(EXPERTS):
        alone = marlinq.load_gptq(**layer.arrays(), group_size=64, kernel=kernel)
        np.testing.assert_array_equal(stack[index](x), alone(x))


def test_sequence_of_experts() -> None:
    stack = load()
    assert len(stack) == stack.num_experts == 5
    assert (stack.k, stack.n_per_expert, stack.device) == (160, 96, "cpu")
    x = normal((2, 160), seed=3)
    results = [linear(x) for linear in stack]
    assert len(results) == 5
    np.testing.assert_array_equal(stack[-1](x), results[4])
    for index in (5, -6, 100):
        with pytest.raises(IndexError, match=f"expert {index} of 5"):
            stack[index]
        with pytest.raises(InvalidArgumentError, match=f"expert: {index}, expected 0 to 4"):
            stack.expert(index)
    with pytest.raises(InvalidArgumentError, match="expert: -1, expected 0 to 4"):
        stack.expert(-1)


def test_a_view_outlives_its_stack() -> None:
    x = normal((2, 160), seed=4)
    view = load_experts(EXPERTS).expert(3)
    np.testing.assert_array_equal(view(x), load()[3](x))


def test_describe() -> None:
    stack = load()
    description = stack.describe()
    assert description["num_experts"] == 5
    assert description["act_order"]
    assert "5 x 160 -> 96" in repr(stack)
    arrays = stack_arrays(EXPERTS)
    stored = sum(array.nbytes for arrays_of in arrays.values() for array in arrays_of)
    assert description["checkpoint_bytes"] == stored


def test_tensors_that_only_some_experts_have() -> None:
    experts = make_experts(4, symmetric=True)
    lists: dict[str, Any] = stack_arrays(experts)
    lists["qzeros"][1] = None
    lists["g_idx"][0] = lists["g_idx"][2] = None  # these are plain
    stack = marlinq.load_gptq_stacked(**lists, group_size=64)
    x = normal((3, 160), seed=5)
    for index, layer in enumerate(experts):
        assert_close(stack[index](x), layer.expected(x), LINEAR_BOUND, f"expert {index}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": 4}, "scales: 4 tensors, expected 5, one per expert as in qweights"),
        ({"qzeros": 6}, "qzeros: 6 tensors, expected 5"),
        ({"g_idx": 0}, "g_idx: 0 tensors, expected 5"),
        ({"bias": 4}, "bias: 4 tensors, expected 5"),
    ],
)
def test_lists_of_different_lengths(change: dict[str, int], message: str) -> None:
    lists: dict[str, Any] = stack_arrays(EXPERTS)
    for name, length in change.items():
        lists[name] = (lists[name] * 2)[:length]
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.load_gptq_stacked(**lists, group_size=64)


def test_no_experts() -> None:
    with pytest.raises(InvalidArgumentError, match="experts: none, expected at least one"):
        marlinq.load_gptq_stacked([], [])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_layer(64, 160, group_size=64, bias=True), "n = 64, expected 96 as in experts"),
        (make_layer(96, 192, group_size=64, bias=True), r"experts.3.qweight: shape \[24, 96\]"),
        (make_layer(96, 160, group_size=32, bias=True), "experts.3.scales: shape"),
        (make_layer(96, 160, group_size=64), "no bias, but experts.0. has one"),
        (
            make_layer(96, 160, group_size=64, bias=True, scale_dtype="F32"),
            "scales are float32, expected float16 as in experts",
        ),
    ],
)
def test_experts_that_differ(other: Layer, message: str) -> None:
    lists: dict[str, Any] = stack_arrays(EXPERTS)
    arrays = other.arrays() | ({} if other.bias is not None else {"bias": None})
    arrays["qweights"] = arrays.pop("qweight")
    for name, array in arrays.items():
        lists[name][3] = array
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        marlinq.load_gptq_stacked(**lists, group_size=64)
    assert "3" in str(raised.value)


def test_a_damaged_expert_is_named() -> None:
    lists = stack_arrays(EXPERTS)
    lists["g_idx"][2] = lists["g_idx"][2].copy()
    lists["g_idx"][2][17] = 3
    with pytest.raises(InvalidArgumentError, match=r"experts\.2\.g_idx: element \[17\] is 3"):
        marlinq.load_gptq_stacked(**lists, group_size=64)


DISPATCHES = [
    [],
    [(2, 0, 0, 20)],
    [(4, 10, 0, 5), (0, 0, 5, 10), (1, 15, 15, 5)],
    [(3, 7, 19, 1), (3, 7, 0, 1), (3, 7, 5, 1)],  # one row three times
    [(1, 0, 3, 0), (0, 4, 4, 4), (1, 20, 20, 0)],  # empty ones
    [(e, r, r, 1) for r, e in enumerate([0, 1, 0, 2, 4, 4, 3, 1, 0, 0])],
]


@pytest.mark.parametrize("dispatches", DISPATCHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_batched_phase(dispatches: list[Any], dtype: Any, threads: int, kernel: str) -> None:
    stack = load(kernel=kernel)
    x = normal((20, 160), seed=6, dtype=dtype)
    own = marlinq.Context("cpu", threads)
    out = np.full((20, 96), 7, dtype)
    assert stack.gemm_phase_batched(x, dispatches, out=out, context=own) is out
    wanted = np.full((20, 96), 7, dtype)
    for expert, first, target, rows in dispatches:
        wanted[target : target + rows] = stack[expert](x[first : first + rows], context=own)
    np.testing.assert_array_equal(out, wanted)


def test_batched_phase_allocates() -> None:
    stack = load()
    x = normal((20, 160), seed=7)
    result = stack.gemm_phase_batched(x, iter([(1, 0, 4, 2)]))
    assert result.shape == (6, 96)
    assert np.all(result[:4] == 0)
    np.testing.assert_array_equal(result[4:], stack[1](x[:2]))
    assert stack.gemm_phase_batched(x, [(1, 0, 4, 2)], out_rows=9).shape == (9, 96)
    assert stack.gemm_phase_batched(x, []).shape == (0, 96)
    wide = stack.gemm_phase_batched(
        x.astype(np.float16), [(1, 0, 0, 2)], out=np.empty((2, 96), np.float32)
    )
    assert wide.dtype == np.float32


@pytest.mark.parametrize(
    ("dispatch", "message"),
    [
        ((5, 0, 0, 1), r"dispatches\[1\]: expert 5, expected 0 to 4"),
        ((-1, 0, 0, 1), r"dispatches\[1\]: expert -1, expected 0 to 4"),
        ((0, 18, 0, 3), r"dispatches\[1\]: input rows 18 \+ 3 of 20"),
        ((0, -1, 0, 1), r"dispatches\[1\]: input rows -1 \+ 1 of 20"),
        ((0, 0, 20, 1), r"dispatches\[1\]: output rows 20 \+ 1 of 20"),
        ((0, 0, -1, 1), r"dispatches\[1\]: output rows -1"),
        ((0, 0, 0, -1), r"dispatches\[1\]: input rows 0 \+ -1 of 20"),
        ((0, 2**62, 0, 2**62), r"dispatches\[1\]: input rows"),
    ],
)
def test_refused_dispatches(dispatch: tuple[int, ...], message: str) -> None:
    out = np.full((20, 96), 7, np.float32)
    with pytest.raises(InvalidArgumentError, match=message):
        load().gemm_phase_batched(normal((20, 160), 1), [(0, 0, 0, 1), dispatch], out=out)
    assert np.all(out == 7), "written before the dispatches were checked"


@pytest.mark.parametrize("dispatch", [(0, 0, 0), (0, 0, 0, 1, 2), (0.5, 0, 0, 1), "abcd", 3])
def test_dispatches_that_are_none(dispatch: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="dispatch"):
        load().gemm_phase_batched(normal((20, 160), 1), [dispatch])
    with pytest.raises(InvalidArgumentError, match="dispatch"):
        load().gemm_phase_batched(
            normal((20, 160), 1), [dispatch], out=np.empty((20, 96), np.float32)
        )


def expected_fused(x: Array, ids: Array, weights: Array | None = None) -> Expected:
    """One output row a routed id, by the definition."""
    products = [layer.expected(x) for layer in EXPERTS]
    rows, magnitudes = [], []
    for token, experts in enumerate(ids):
        for slot, expert in enumerate(experts):
            factor = 1.0 if weights is None else float(weights[token, slot])
            here = products[expert] if expert >= 0 else None
            rows.append(np.zeros(96) if here is None else factor * here.y[token])
            magnitudes.append(np.zeros(96) if here is None else factor**2 * here.magnitude[token])
    return Expected(np.reshape(rows, (-1, 96)), np.reshape(magnitudes, (-1, 96)))


ROUTINGS = {
    "random": np.random.default_rng(1).integers(0, 5, (37, 2)),
    "one expert": np.full((37, 1), 3),
    "some are empty": np.random.default_rng(2).choice([0, 4], (37, 3)),
    "some are not here": np.random.default_rng(3).integers(-1, 5, (37, 2)),
    "none is here": np.full((5, 2), -1),
    "one token": np.array([[4, 1]]),
    "no token": np.zeros((0, 2), np.int64),
    "skewed": np.minimum(np.random.default_rng(4).geometric(0.7, (64, 4)) - 1, 4),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("block_size", [8, 16, 32, 48, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_phase(routing: str, block_size: int, weighted: bool, kernel: str) -> None:
    ids = ROUTINGS[routing].astype(np.int32)
    tokens, top_k = ids.shape
    x = normal((tokens, 160), seed=8)
    weights = normal(ids.shape, seed=9) if weighted else None
    tiles = marlinq.moe_align_block_size(ids, block_size, 5)
    stack = load(kernel=kernel)
    out = np.full((tokens * top_k, 96), np.nan, np.float32)  # zeros are not needed beforehand
    result = stack.gemm_phase_fused(
        x,
        *tiles,
        block_size=block_size,
        top_k=top_k,
        num_tokens=tokens,
        topk_weights=None if weights is None else weights.reshape(-1),
        out=out,
    )
    assert result is out
    what = f"{routing}, block_size {block_size}"
    assert_close(out, expected_fused(x, ids, weights), LINEAR_BOUND, what)
    assert np.all(out[ids.reshape(-1) == -1] == 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_fused_phase_types_and_threads(dtype: Any, kernel: str) -> None:
    ids = ROUTINGS["random"].astype(np.int32)
    x = normal((37, 160), seed=10, dtype=dtype)
    tokens, experts, count = marlinq.moe_align_block_size(ids, 16, 5)
    stack = load(kernel=kernel)
    sizes = {"block_size": 16, "top_k": 2, "num_tokens": 37}
    counted = np.array([count], np.int32)
    first = stack.gemm_phase_fused(
        x, tokens, experts, counted, **sizes, context=marlinq.Context("cpu", 1)
    )
    assert first.dtype == dtype
    again = stack.gemm_phase_fused(
        x, tokens, experts, count, **sizes, context=marlinq.Context("cpu", 2)
    )
    np.testing.assert_array_equal(first, again)
    wide = stack.gemm_phase_fused(
        x, tokens, experts, count, **sizes, out=np.empty((74, 96), np.float32)
    )
    np.testing.assert_array_equal(first, wide.astype(dtype))
    assert_close(wide, expected_fused(x, ids), LINEAR_BOUND, f"37 tokens, top 2, {dtype}")


def test_padding_beyond_the_count_is_ignored() -> None:
    ids = ROUTINGS["random"].astype(np.int32)
    x = normal((37, 160), seed=11)
    tokens, experts, count = marlinq.moe_align_block_size(ids, 8, 5)
    stack = load()
    sizes = {"block_size": 8, "top_k": 2, "num_tokens": 37}
    wanted = stack.gemm_phase_fused(x, tokens, experts, count, **sizes)
    longer = np.concatenate([tokens, np.full(80, -123, np.int32)])
    more = np.concatenate([experts, np.full(10, 99, np.int32)])
    np.testing.assert_array_equal(stack.gemm_phase_fused(x, longer, more, count, **sizes), wanted)


def _fused_arguments() -> dict[str, Any]:
    ids = np.array([[0, 1], [2, 3], [4, 0]], np.int32)
    tokens, experts, count = marlinq.moe_align_block_size(ids, 8, 5)
    return {
        "x": normal((3, 160), seed=12),
        "sorted_token_ids": tokens,
        "expert_ids": experts,
        "num_tokens_past_padded": count,
        "block_size": 8,
        "top_k": 2,
        "num_tokens": 3,
    }


def _changed(name: str, place: int, value: int) -> Array:
    array = _fused_arguments()[name].copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 7}, "block_size: 7, expected 8, 16, 32, 48 or 64"),
        ({"top_k": 0}, "top_k: 0, expected at least 1"),
        ({"num_tokens": -1}, "num_tokens: -1, expected at least 0|shape"),
        ({"num_tokens": 4}, "x: 3 rows, expected at least 4"),
        ({"out": np.empty((5, 96), np.float32)}, "out: 5 rows, expected at least 6"),
        ({"x": normal((3, 159), 1)}, "x: 159 columns, expected 160"),
        ({"num_tokens_past_padded": 41}, "num_tokens_past_padded: 41, expected a multiple"),
        ({"num_tokens_past_padded": 4000}, "num_tokens_past_padded: 4000, expected a multiple"),
        ({"num_tokens_past_padded": -8}, "num_tokens_past_padded: -8"),
        ({"expert_ids": _changed("expert_ids", 2, 5)}, r"expert_ids: element \[2\] is 5"),
        ({"expert_ids": _changed("expert_ids", 0, -2)}, r"expert_ids: element \[0\] is -2"),
        (
            {"sorted_token_ids": _changed("sorted_token_ids", 9, -1)},
            r"sorted_token_ids: element \[9\] is -1",
        ),
        ({"sorted_token_ids": np.zeros(40, np.int64)}, "sorted_token_ids: dtype int64"),
        ({"expert_ids": np.zeros(5, np.float32)}, "expert_ids: dtype float32"),
        ({"topk_weights": np.ones(5, np.float32)}, "topk_weights: 5 elements, expected at least 6"),
        ({"topk_weights": np.ones(6, np.float16)}, "topk_weights: dtype float16, expected float32"),
    ],
)
def test_refused_tiles(change: dict[str, Any], message: str) -> None:
    stack = load()
    with pytest.raises(InvalidArgumentError, match=message):
        stack.gemm_phase_fused(**(_fused_arguments() | change))
    assert np.isfinite(stack.gemm_phase_fused(**_fused_arguments())).all()


def test_bias_of_some_experts_only_is_refused() -> None:
    experts = [EXPERTS[0], replace(EXPERTS[1], bias=None)]
    lists: dict[str, Any] = stack_arrays([replace(layer, bias=None) for layer in experts])
    lists["bias"] = [experts[0].arrays()["bias"], None]
    with pytest.raises(InvalidArgumentError, match=r"no bias, but experts\[0\] has one"):
        marlinq.load_gptq_stacked(**lists, group_size=64)
