"""Routing on the device against plain definitions: choosing experts, sorting tokens into tiles."""

from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from cuda_support import DEVICE, guarded, needs_device, torch, untouched
from gptq_writer import Array
from marlinq import _core
from marlinq._context import context_for
from marlinq.errors import InvalidArgumentError
from routing_reference import reference_align, reference_route
from support import normal, tolerance

pytestmark = needs_device

WEIGHT_BOUND = tolerance("routing", "cuda_weights")
EXPERTS = [1, 2, 8, 60, 128, 256, 512, 1024]
TOKENS = [0, 1, 3, 17, 64, 257, 4096]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]

Tensor = Any


def on_device(array: Array) -> Tensor:
    """The same numbers in the same type on the device."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(DEVICE, torch.bfloat16)
    return torch.from_numpy(array).to(DEVICE)


def check_route(logits: Array, top_k: int, **options: Any) -> None:
    """With a correction bias, experts whose scores float32 cannot tell apart may swap."""
    ids, weights = (t.cpu().numpy() for t in marlinq.route(on_device(logits), top_k, **options))
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    assert ids.shape == weights.shape == (len(logits), top_k)
    if not len(logits):
        return
    wanted_ids, wanted_weights = reference_route(logits, top_k, **options)
    same = (ids == wanted_ids).all(-1)
    if options.get("correction_bias") is None:
        assert same.all(), f"tokens {np.flatnonzero(~same)[:5]}"
    np.testing.assert_allclose(weights[same], wanted_weights[same], rtol=WEIGHT_BOUND)
    if same.all():
        return
    experts = logits.shape[1]
    plain = {"scoring": options.get("scoring", "softmax"), "renormalise": False}
    order, scores = reference_route(logits[~same], experts, **plain)
    choice = np.empty_like(scores)
    np.put_along_axis(choice, order, scores, -1)
    choice += options["correction_bias"]
    taken, wanted = (np.take_along_axis(choice, i[~same], -1) for i in (ids, wanted_ids))
    np.testing.assert_allclose(taken, wanted, rtol=0, atol=1e-6)
    assert (~same).sum() <= max(1, len(logits) // 100)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_route(experts: int, dtype: Any, scoring: str) -> None:
    logits = normal((max(TOKENS), experts), seed=experts, dtype=dtype)
    for tokens in TOKENS:
        counts = (1, 2, 3, 5, 8, 16) if tokens < 1000 else (8,)
        for top_k in sorted({min(count, experts) for count in counts}):
            check_route(logits[:tokens], top_k, scoring=scoring)


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_top_k(top_k: int) -> None:
    logits = normal((33, 64), seed=top_k)
    check_route(logits, top_k)
    check_route(logits, top_k, renormalise=False)


OPTIONS: list[dict[str, Any]] = [
    {"renormalise": False},
    {"scoring": "sigmoid", "renormalise": False, "scale": 2.5},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 4, "top_groups": 4},
    {"num_groups": 4, "top_groups": 3, "scoring": "sigmoid", "scale": 0.5},
    {"num_groups": 4, "top_groups": 2, "scoring": "sigmoid", "correction_bias": True},
    {"num_groups": 4, "top_groups": 3, "correction_bias": True, "renormalise": False},
    {"correction_bias": True},
    {"correction_bias": True, "scoring": "sigmoid", "renormalise": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("experts", [8, 60, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(options: dict[str, Any], experts: int, dtype: Any) -> None:
    if "correction_bias" in options:
        options = options | {"correction_bias": normal(experts, seed=1) / 4}
    for tokens in (1, 257):
        logits = normal((tokens, experts), seed=experts + tokens, dtype=dtype)
        check_route(logits, min(4, experts // 4), **options)


@pytest.mark.parametrize(
    ("experts", "num_groups", "top_groups"),
    [
        (256, 8, 4),
        (160, 8, 3),
        (60, 60, 9),
        (60, 12, 11),
        (1024, 1024, 900),
        (1024, 2, 1),
        (6, 3, 2),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_groups(experts: int, num_groups: int, top_groups: int, bias: bool) -> None:
    logits = normal((65, experts), seed=experts)
    check_route(
        logits,
        4,
        scoring="sigmoid",
        num_groups=num_groups,
        top_groups=top_groups,
        correction_bias=normal(experts, seed=2) / 4 if bias else None,
    )


@pytest.mark.parametrize("experts", [2, 60, 128, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_index(experts: int, dtype: Any) -> None:
    top_k = min(experts, 16)
    few = np.random.default_rng(experts).integers(-2, 3, (129, experts)).astype(dtype)
    for scoring in ("softmax", "sigmoid"):
        check_route(few, top_k, scoring=scoring)
        check_route(np.zeros((3, experts), dtype), top_k, scoring=scoring)
    if experts > 2:
        check_route(few, 8, num_groups=4, top_groups=2)
        check_route(np.zeros((3, experts), dtype), 8, num_groups=4, top_groups=2)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_logits_of_any_size(scoring: str, renormalise: bool) -> None:
    """As on the CPU: infinities, NaNs, and scores that float32 has no numbers for."""
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [1000, 999, -1000, 0],
            [-1000, -1001, -1000, -2000],
            [-300, -301, -299, -200],
            [inf, 0, 1, 2],
            [inf, inf, 1, 2],
            [-inf, -inf, -inf, -inf],
            [-inf, nan, 5, nan],
            [nan, 1, 2, 0],
            [nan] * 4,
            [1e38, -1e38, 1e38, 0],
            [-0.0, 0.0, nan, -0.0],
        ],
        np.float32,
    )
    options = {"scoring": scoring, "renormalise": renormalise}
    for top_k in (1, 2, 4):
        wanted_ids, wanted_weights = marlinq.route(logits, top_k, **options)
        ids, weights = marlinq.route(on_device(logits), top_k, **options)
        np.testing.assert_array_equal(ids.cpu(), wanted_ids)
        np.testing.assert_allclose(weights.cpu(), wanted_weights, rtol=WEIGHT_BOUND, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 4, 20])
@pytest.mark.parametrize("columns", [100, 101])
def test_strided_and_single_logits(dtype: Any, offset: int, columns: int) -> None:
    frame = on_device(normal((12, columns), seed=3, dtype=dtype))
    view = frame[::2, offset : offset + 64]
    wanted = marlinq.route(view.contiguous(), 4)
    for actual, expected in zip(marlinq.route(view, 4), wanted, strict=True):
        assert torch.equal(actual, expected)
    ids, weights = marlinq.route(view[1], 4)
    assert ids.shape == weights.shape == (4,)
    assert torch.equal(ids, wanted[0][1])
    folded = view.contiguous().view(2, 3, 64)
    assert torch.equal(marlinq.route(folded, 4)[0], wanted[0].view(2, 3, 4))


def test_route_writes_its_outputs_alone() -> None:
    logits = on_device(normal((70, 40), seed=5))
    wanted_ids, wanted_weights = marlinq.route(logits, 3)
    context = context_for(DEVICE, None, logits)
    id_store, ids = guarded(70, 3, torch.int32)
    weight_store, weights = guarded(70, 3, torch.float32)
    _core.route(context, logits, ids, weights, top_k=3)
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(weights, wanted_weights)
    assert untouched(id_store, ids)
    assert untouched(weight_store, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k: 0, expected"),
        ({"top_k": 17}, "top_k: 17, expected 1 to 16 for 64 experts"),
        ({"scoring": "tanh"}, "scoring: 'tanh', expected one of softmax, sigmoid"),
        ({"num_groups": 7}, "num_groups: 7, expected a divisor of 64"),
        ({"num_groups": 8, "top_groups": 9}, "top_groups: 9, expected 1 to 8"),
        ({"num_groups": 32, "top_groups": 1, "top_k": 4}, "top_groups: 1, .* top_k = 4"),
        ({"correction_bias": np.zeros(63, np.float32)}, "correction_bias: 63 elements, expected"),
        (
            {"correction_bias": np.full(64, np.inf, np.float32)},
            r"correction_bias: element \[0\] is inf, expected a finite number",
        ),
    ],
)
def test_refused_options(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": on_device(normal((2, 64), seed=1)), "top_k": 2} | change
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.route(**arguments)


def test_refused_logits() -> None:
    logits = torch.zeros((2, 64), device=DEVICE)

    def refused(message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            marlinq.route(*arguments, **options)

    refused("logits: dtype int32", logits.int(), 2)
    refused("logits: dtype float64", logits.double(), 2)
    refused("logits: requires grad", logits.clone().requires_grad_(), 2)
    refused("logits: stride 2 along the last axis", logits[:, ::2], 2)
    refused("logits: 1025 experts, expected 1 to 1024", torch.zeros((2, 1025), device=DEVICE), 2)
    refused("logits: 0 experts, expected 1 to 1024", torch.zeros((2, 0), device=DEVICE), 1)
    refused(
        f"correction_bias: float32 on {DEVICE}, expected float32 on cpu",
        logits,
        2,
        correction_bias=logits[0],
    )
    refused(f"logits: on {DEVICE}, expected cpu", logits, 2, context=marlinq.Context("cpu"))
    context = context_for(DEVICE, None, logits)
    ids = torch.empty((2, 2), dtype=torch.int32, device=DEVICE)
    weights = torch.empty((2, 2), device=DEVICE)
    for change, message in (
        ({"logits": logits.cpu()}, f"logits: on cpu, expected {DEVICE}"),
        ({"ids": ids.cpu()}, f"ids: on cpu, expected {DEVICE}"),
        ({"ids": ids.long()}, "ids: dtype int64, expected int32"),
        ({"ids": ids[:1]}, "ids: 1 rows, expected at least 2"),
        ({"weights": weights.half()}, "weights: dtype float16, expected float32"),
        ({"weights": weights[:, :1]}, "weights: 1 columns, expected 2"),
    ):
        arguments = {"logits": logits, "ids": ids, "weights": weights} | change
        with pytest.raises(InvalidArgumentError, match=message):
            _core.route(context, **arguments, top_k=2)


# --- tiles ---


def check_align(
    ids: Array, block_size: int, experts: int, here: Array | None = None, given: Any = None
) -> None:
    """All of the lists, the padding past their end included; `given` is the expert map `here`."""
    tokens, tiles, count = marlinq.moe_align_block_size(on_device(ids), block_size, experts, given)
    for array in (tokens, tiles, count):
        assert (array.dtype, str(array.device)) == (torch.int32, DEVICE)
    wanted_tokens, wanted_tiles = reference_align(ids, block_size, experts, here)
    assert count.tolist() == [len(wanted_tokens)]
    assert len(tokens) == _core.most_aligned_ids(ids.size, block_size, experts)
    assert len(tiles) * block_size == len(tokens)
    padding = len(tokens) - len(wanted_tokens)
    assert padding >= 0
    np.testing.assert_array_equal(
        tokens.cpu(), np.pad(wanted_tokens, (0, padding), constant_values=ids.size)
    )
    np.testing.assert_array_equal(
        tiles.cpu(), np.pad(wanted_tiles, (0, padding // block_size), constant_values=-1)
    )


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("lowest", [0, -1])
def test_align(experts: int, dtype: type, lowest: int) -> None:
    random = np.random.default_rng(experts)
    for tokens in TOKENS:
        for top_k, block_size in ((1, 8), (2, 48), (8, 16), (16, 64), (5, 32)):
            ids = random.integers(lowest, experts, (tokens, top_k)).astype(dtype)
            check_align(ids, block_size, experts)


@pytest.mark.parametrize("experts", [1, 8, 1024])
def test_align_of_one_expert_and_none(experts: int) -> None:
    for one in (0, experts - 1, -1):
        for tokens in (1, 257, 4096):
            check_align(np.full((tokens, 8), one), 16, experts)


@pytest.mark.parametrize("experts", [6, 1024])
@pytest.mark.parametrize("where", ["host", "torch host", "device"])
def test_align_with_an_expert_map(experts: int, where: str) -> None:
    random = np.random.default_rng(9)
    here = random.integers(-1, experts, experts).astype(np.int32)
    given = here if where == "host" else torch.from_numpy(here)
    if where == "device":
        given = given.to(DEVICE)
    for tokens in (0, 1, 21, 4096):
        ids = random.integers(-1, experts, (tokens, 2))
        check_align(ids, 8, experts, here, given)


def test_align_of_strided_ids() -> None:
    random = np.random.default_rng(2)
    for dtype in (torch.int32, torch.int64):
        frame = torch.from_numpy(random.integers(-1, 60, (130, 11))).to(DEVICE, dtype)
        view = frame[::2, 3:9]
        wanted = marlinq.moe_align_block_size(view.contiguous(), 16, 60)
        for actual, expected in zip(
            marlinq.moe_align_block_size(view, 16, 60), wanted, strict=True
        ):
            assert torch.equal(actual, expected)
        folded = view.contiguous().view(5, 13, 6)
        assert torch.equal(marlinq.moe_align_block_size(folded, 16, 60)[0], wanted[0])


def test_ids_out_of_range_count_as_none() -> None:
    ids = np.random.default_rng(3).integers(0, 8, (257, 4))
    foreign = np.random.default_rng(4).choice([-2, -(2**40), 8, 9, 2**32], ids.shape)
    absent = np.random.default_rng(5).random(ids.shape) < 0.3
    wanted = marlinq.moe_align_block_size(on_device(np.where(absent, -1, ids)), 16, 8)
    actual = marlinq.moe_align_block_size(on_device(np.where(absent, foreign, ids)), 16, 8)
    for one, other in zip(actual, wanted, strict=True):
        assert torch.equal(one, other)


def test_align_writes_its_lists_alone() -> None:
    ids = on_device(np.random.default_rng(6).integers(-1, 60, (33, 4)))
    wanted = marlinq.moe_align_block_size(ids, 32, 60)
    stores = [
        torch.full((len(array) + 32,), -7, dtype=torch.int32, device=DEVICE) for array in wanted
    ]
    lists = [store[9 : 9 + len(array)] for store, array in zip(stores, wanted, strict=True)]
    _core.moe_align_block_size_into(
        context_for(DEVICE, None, ids), ids, *lists, block_size=32, num_experts=60
    )
    for store, actual, expected in zip(stores, lists, wanted, strict=True):
        assert torch.equal(actual, expected)
        actual.fill_(-7)
        assert bool((store == -7).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 12}, "block_size: 12, expected 8, 16, 32, 48 or 64"),
        ({"num_experts": 0}, "num_experts: 0, expected 1 to 1024"),
        ({"num_experts": 1025}, "num_experts: 1025, expected 1 to 1024"),
        ({"expert_map": np.zeros(3, np.int32)}, "expert_map: 3 elements, expected 4"),
        ({"expert_map": np.zeros(4, np.int64)}, "expert_map: dtype int64, expected int32"),
    ],
)
def test_refused_alignment(change: dict[str, Any], message: str) -> None:
    ids = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    arguments = {"topk_ids": ids, "block_size": 8, "num_experts": 4}
    with pytest.raises(InvalidArgumentError, match=message):
        marlinq.moe_align_block_size(**(arguments | change))


def test_refused_ids_and_lists() -> None:
    ids = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    with pytest.raises(InvalidArgumentError, match="topk_ids: dtype float32, expected int32"):
        marlinq.moe_align_block_size(ids.float(), 8, 4)
    with pytest.raises(InvalidArgumentError, match=r"expert_map: shape .* is not contiguous"):
        marlinq.moe_align_block_size(
            ids, 8, 4, torch.zeros(8, dtype=torch.int32, device=DEVICE)[::2]
        )
    lists = [torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (32, 4, 1)]
    context = context_for(DEVICE, None, ids)
    for index, change, message in (
        (0, lists[0][:31], "sorted_token_ids: 31 elements, expected at least 32"),
        (0, lists[0].cpu(), f"sorted_token_ids: on cpu, expected {DEVICE}"),
        (1, lists[1][:3], "expert_ids: 3 elements, expected at least 4"),
        (1, lists[1].long(), "expert_ids: dtype int64, expected int32"),
        (2, lists[2][:0], "num_tokens_past_padded: 0 elements, expected at least 1"),
    ):
        changed = [*lists[:index], change, *lists[index + 1 :]]
        with pytest.raises(InvalidArgumentError, match=message):
            _core.moe_align_block_size_into(context, ids, *changed, block_size=8, num_experts=4)


# --- streams and graphs ---


def test_a_graph_with_routing_that_changes() -> None:
    """Logits to tiles in one graph, replayed with other logits: nothing was read by the host."""
    stream = torch.cuda.Stream()
    logits = torch.zeros((64, 128), device=DEVICE, dtype=torch.bfloat16)
    bias = normal(128, seed=7) / 4
    here = np.random.default_rng(8).permutation(128).astype(np.int32)

    def run() -> list[Tensor]:
        ids, weights = marlinq.route(
            logits, 8, scoring="sigmoid", correction_bias=bias, num_groups=8, top_groups=4
        )
        plain = marlinq.route(logits, 4)
        lists = marlinq.moe_align_block_size(ids, 16, 128, here)
        return [ids, weights, *plain, *lists]

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()
        context = context_for(DEVICE, None, logits)
        allocations = context.scratch_allocations
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
        for seed in range(20):
            logits.copy_(on_device(normal((64, 128), seed=seed)))
            if seed == 10:
                logits.zero_()
            for array in captured:
                array.fill_(-7)
            graph.replay()
            for array, wanted in zip(captured, run(), strict=True):
                assert torch.equal(array, wanted)
        assert context.scratch_allocations == allocations
    stream.synchronize()


def test_a_graph_keeps_a_bias_and_a_map_of_the_host() -> None:
    stream = torch.cuda.Stream()
    logits = on_device(normal((9, 16), seed=1))
    bias = normal(16, seed=2)
    here = np.arange(16, dtype=np.int32)[::-1].copy()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        wanted = [marlinq.route(logits, 2, correction_bias=bias)[0]]
        wanted += marlinq.moe_align_block_size(wanted[0], 8, 16, here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = [marlinq.route(logits, 2, correction_bias=bias)[0]]
            captured += marlinq.moe_align_block_size(captured[0], 8, 16, here)
        bias[:] = 0
        here[:] = 0
        graph.replay()
        for array, expected in zip(captured, wanted, strict=True):
            assert torch.equal(array, expected)
    stream.synchronize()


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_the_same_bits_every_time(tokens: int) -> None:
    logits = on_device(normal((tokens, 256), seed=tokens))
    ids, weights = marlinq.route(logits, 8)
    lists = marlinq.moe_align_block_size(ids, 32, 256)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(100):
        again = marlinq.route(logits, 8)
        same &= (again[0] == ids).all() & (again[1] == weights).all()
        for one, other in zip(marlinq.moe_align_block_size(ids, 32, 256), lists, strict=True):
            same &= (one == other).all()
    assert bool(same)


def test_a_context_of_the_callers_own() -> None:
    stream = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
    logits = on_device(normal((33, 60), seed=4))
    wanted = marlinq.route(logits, 4)
    wanted += marlinq.moe_align_block_size(wanted[0], 16, 60)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ids, weights = marlinq.route(logits, 4, context=context)
        lists = marlinq.moe_align_block_size(ids, 16, 60, context=context)
    stream.synchronize()
    for one, other in zip((ids, weights, *lists), wanted, strict=True):
        assert torch.equal(one, other)
