"""Choosing experts and sorting tokens into tiles, against plain definitions."""

from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from marlinq import _core
from marlinq.errors import InvalidArgumentError
from routing_reference import reference_align, reference_route
from support import normal, tolerance

WEIGHT_BOUND = tolerance("routing", "weights")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"renormalise": False},
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "renormalise": False, "scale": 2.5},
    {"num_groups": 8, "top_groups": 3},
    {"num_groups": 8, "top_groups": 8},
    {"scoring": "sigmoid", "num_groups": 8, "top_groups": 4, "correction_bias": True},
    {"correction_bias": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("top_k", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_route(options: dict[str, Any], top_k: int, dtype: Any) -> None:
    if options.get("correction_bias") is not None:
        options = options | {"correction_bias": normal(64, seed=1) / 4}
    logits = normal((33, 64), seed=top_k, dtype=dtype)
    ids, weights = marlinq.route(logits, top_k, **options)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    wanted_ids, wanted_weights = reference_route(logits, top_k, **options)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted_weights, rtol=WEIGHT_BOUND)


@pytest.mark.parametrize("experts", [1, 2, 7, 60, 128, 512, 1024])
def test_numbers_of_experts(experts: int) -> None:
    logits = normal((9, experts), seed=experts)
    top_k = min(experts, 8)
    ids, weights = marlinq.route(logits, top_k)
    wanted_ids, wanted_weights = reference_route(logits, top_k)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted_weights, rtol=WEIGHT_BOUND)


def test_equal_scores_take_the_lower_index_first() -> None:
    ids, weights = marlinq.route(np.zeros((3, 10), np.float32), 4)
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(4), (3, 4)))
    np.testing.assert_allclose(weights, 0.25, rtol=WEIGHT_BOUND)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_logits_of_any_size(scoring: str) -> None:
    logits = np.array(
        [
            [1000, 999, -1000, 0],
            [-1000, -1001, -1000, -2000],
            [np.inf, 0, 1, 2],
            [np.inf, np.inf, 1, 2],
            [-np.inf, -np.inf, -np.inf, -np.inf],
            [np.nan, 1, 2, 0],
            [np.nan] * 4,
        ],
        np.float32,
    )
    for renormalise in (False, True):
        ids, weights = marlinq.route(logits, 2, scoring=scoring, renormalise=renormalise)
        assert np.isfinite(weights).all()
        assert np.all((ids >= 0) & (ids < 4))
        assert np.all(ids[:, 0] != ids[:, 1])
    np.testing.assert_array_equal(ids[0], [0, 1])
    np.testing.assert_array_equal(ids[5], [2, 1], "a NaN was preferred to a number")


def test_strided_and_single_logits() -> None:
    frame = normal((12, 100), seed=3)
    view = frame[::2, 20:84]
    ids, weights = marlinq.route(view, 4)
    wanted = marlinq.route(np.ascontiguousarray(view), 4)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(weights, wanted[1])
    ids, weights = marlinq.route(view[0], 4)
    assert ids.shape == weights.shape == (4,)
    np.testing.assert_array_equal(ids, wanted[0][0])
    assert marlinq.route(view[:0], 4)[0].shape == (0, 4)
    assert marlinq.route(view.copy(), 4, context=marlinq.Context("cpu", 2))[0].shape == (6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k: 0, expected"),
        ({"top_k": -1}, "top_k: -1, expected"),
        ({"top_k": 17}, "top_k: 17, expected 1 to 16 for 64 experts"),
        ({"logits": np.zeros((2, 3), np.float32), "top_k": 4}, "top_k: 4, expected 1 to 3"),
        ({"scoring": "tanh"}, "scoring: 'tanh', expected one of softmax, sigmoid"),
        ({"num_groups": 7}, "num_groups: 7, expected a divisor of 64"),
        ({"num_groups": 0}, "num_groups: 0, expected a divisor"),
        ({"num_groups": 8, "top_groups": 9}, "top_groups: 9, expected 1 to 8"),
        ({"num_groups": 8, "top_groups": 0}, "top_groups: 0, expected 1 to 8"),
        ({"num_groups": 32, "top_groups": 1, "top_k": 4}, "top_groups: 1, .* top_k = 4"),
        ({"correction_bias": np.zeros(63, np.float32)}, "correction_bias: 63 elements, expected"),
        ({"correction_bias": np.zeros(64)}, "correction_bias: dtype float64"),
        ({"correction_bias": np.zeros(64, np.float16)}, "correction_bias: float16 on cpu"),
        ({"logits": np.zeros((2, 64))}, "logits: dtype float64"),
        ({"logits": np.zeros((2, 64), np.int32)}, "logits: dtype int32"),
        ({"logits": np.zeros((2, 1025), np.float32)}, "logits: 1025 experts, expected 1 to 1024"),
        ({"logits": np.zeros((2, 0), np.float32)}, "logits: 0 experts, expected 1 to 1024"),
        ({"logits": np.float32(3)}, "logits: "),
        ({"logits": [[1.0, 2.0]]}, "logits: list, expected a numpy array"),
    ],
)
def test_refused_routing(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": normal((2, 64), seed=1), "top_k": 2} | change
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.route(**arguments)


@pytest.mark.parametrize("block_size", [8, 16, 32, 48, 64])
@pytest.mark.parametrize(
    ("experts", "shape"), [(1, (5, 1)), (8, (33, 2)), (60, (7, 4)), (1024, (64, 16)), (8, (0, 2))]
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("lowest", [0, -1])
def test_align(
    block_size: int, experts: int, shape: tuple[int, int], dtype: type, lowest: int
) -> None:
    ids = np.random.default_rng(experts).integers(lowest, experts, shape).astype(dtype)
    tokens, tiles, count = marlinq.moe_align_block_size(ids, block_size, experts)
    assert tokens.dtype == tiles.dtype == np.int32
    wanted_tokens, wanted_tiles = reference_align(ids, block_size, experts)
    assert count == len(wanted_tokens)
    np.testing.assert_array_equal(tokens[:count], wanted_tokens)
    np.testing.assert_array_equal(tiles[: count // block_size], wanted_tiles)


def test_align_with_an_expert_map() -> None:
    ids = np.random.default_rng(9).integers(0, 6, (21, 2))
    here = np.array([-1, 1, -1, 0, 2, -1], np.int32)
    tokens, tiles, count = marlinq.moe_align_block_size(ids, 8, 6, here)
    plain_tokens, plain_tiles, plain_count = marlinq.moe_align_block_size(ids, 8, 6)
    assert count == plain_count
    np.testing.assert_array_equal(tokens, plain_tokens)
    np.testing.assert_array_equal(tiles, here[plain_tiles])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 12}, "block_size: 12, expected 8, 16, 32, 48 or 64"),
        ({"num_experts": 0}, "num_experts: 0, expected 1 to 1024"),
        ({"num_experts": 1025}, "num_experts: 1025, expected 1 to 1024"),
        ({"num_experts": 3}, r"topk_ids: element \[1, 1\] is 3, expected -1 to 2"),
        ({"topk_ids": np.array([[0, -2]])}, r"topk_ids: element \[0, 1\] is -2"),
        ({"topk_ids": np.array([[0, 2**40]])}, r"topk_ids: element \[0, 1\] is 1099511627776"),
        ({"topk_ids": np.zeros((2, 2), np.float32)}, "topk_ids: dtype float32, expected int32"),
        ({"topk_ids": np.zeros((2, 2), np.int16)}, "topk_ids: dtype int16"),
        ({"topk_ids": [[0]]}, "topk_ids: list, expected a numpy array"),
        ({"expert_map": np.zeros(3, np.int32)}, "expert_map: 3 elements, expected 4"),
        ({"expert_map": np.zeros(4, np.int64)}, "expert_map: int64 on cpu, expected int32"),
    ],
)
def test_refused_alignment(change: dict[str, Any], message: str) -> None:
    arguments = {"topk_ids": np.array([[0, 1], [2, 3]]), "block_size": 8, "num_experts": 4}
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.moe_align_block_size(**(arguments | change))


def test_align_into_lists_of_the_caller(context: marlinq.Context) -> None:
    ids = np.random.default_rng(4).integers(-1, 6, (21, 2))
    here = np.array([-1, 1, -1, 0, 2, -1], np.int32)
    entries = _core.most_aligned_ids(42, 8, 6)
    tokens, tiles, count = (np.full(size, -7, np.int32) for size in (entries + 5, entries, 1))
    for expert_map in (None, here):
        _core.moe_align_block_size_into(
            context, ids, tokens, tiles, count, block_size=8, num_experts=6, expert_map=expert_map
        )
        wanted_tokens, wanted_tiles = reference_align(ids, 8, 6, expert_map)
        assert count[0] == len(wanted_tokens) <= entries
        np.testing.assert_array_equal(tokens[: count[0]], wanted_tokens)
        assert np.all(tokens[count[0] :] == 42)
        np.testing.assert_array_equal(tiles[: count[0] // 8], wanted_tiles)
        assert np.all(tiles[count[0] // 8 :] == -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sorted_token_ids": np.zeros(31, np.int32)}, "sorted_token_ids: 31 elements, expected"),
        ({"sorted_token_ids": np.zeros(40, np.int64)}, "sorted_token_ids: dtype int64, expected"),
        ({"expert_ids": np.zeros(3, np.int32)}, "expert_ids: 3 elements, expected at least 4"),
        ({"expert_ids": np.zeros(8, np.int32)[::2]}, r"expert_ids: shape \[4\] is not contiguous"),
        (
            {"num_tokens_past_padded": np.zeros(0, np.int32)},
            "num_tokens_past_padded: 0 elements, expected at least 1",
        ),
        (
            {"num_tokens_past_padded": np.broadcast_to(np.int32(0), (1,))},
            "num_tokens_past_padded: read-only",
        ),
        ({"topk_ids": np.array([[0, 4]] * 2)}, r"topk_ids: element \[0, 1\] is 4"),
        ({"expert_map": np.zeros(4, np.int64)}, "expert_map: dtype int64, expected int32"),
    ],
)
def test_refused_lists(context: marlinq.Context, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "topk_ids": np.array([[0, 1], [2, 3]]),
        "sorted_token_ids": np.zeros(32, np.int32),
        "expert_ids": np.zeros(4, np.int32),
        "num_tokens_past_padded": np.zeros(1, np.int32),
    }
    with pytest.raises(InvalidArgumentError, match=message):
        _core.moe_align_block_size_into(
            context, **(arguments | change), block_size=8, num_experts=4
        )


def test_refused_sizes_of_lists() -> None:
    assert _core.most_aligned_ids(0, 8, 4) == 0
    with pytest.raises(InvalidArgumentError, match="block_size: 0, expected 8"):
        _core.most_aligned_ids(4, 0, 4)
    with pytest.raises(InvalidArgumentError, match="num_experts: 0, expected 1 to 1024"):
        _core.most_aligned_ids(4, 8, 0)
