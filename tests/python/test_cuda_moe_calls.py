"""How stacks and blocks of the CUDA backend are called: arrays, streams, graphs, threads, bits."""

import itertools
from collections.abc import Callable
from typing import Any

import marlinq
import ml_dtypes
import numpy as np
import pytest
from cuda_support import (
    BLOCK_BOUNDS,
    BOUNDS,
    DEVICE,
    DEVICES,
    TYPES,
    DeviceLayer,
    DeviceStack,
    Experts,
    check_refused_in_capture,
    check_rows,
    host,
    in_threads,
    needs_device,
    needs_two_devices,
    normal,
    run_with_jax,
    torch,
)
from marlinq import _core
from marlinq.errors import InvalidArgumentError

pytestmark = needs_device

Tensor = Any

EXPERTS, HIDDEN, INNER = 8, 256, 160
GATE_UP = {"act_order": True, "bias": True, "seed": 1}
DOWN = {"act_order": True, "bias": True, "seed": 2}


def load(device: str = DEVICE, **options: Any) -> tuple[marlinq.ExpertStack, marlinq.ExpertStack]:
    gate_up = DeviceStack(EXPERTS, 2 * INNER, HIDDEN, **GATE_UP).load(device, **options)
    return gate_up, DeviceStack(EXPERTS, HIDDEN, INNER, **DOWN).load(device, **options)


@pytest.fixture(scope="module")
def stacks() -> tuple[marlinq.ExpertStack, marlinq.ExpertStack]:
    return load()


@pytest.fixture(scope="module")
def stack(stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]) -> marlinq.ExpertStack:
    return stacks[0]


@pytest.fixture(scope="module")
def block(stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]) -> marlinq.MoeBlock:
    return marlinq.MoeBlock(*stacks)


class Tokens:
    """Arguments of a block, some ids of which are -1."""

    def __init__(
        self,
        tokens: int,
        top_k: int = 2,
        dtype: str = "float16",
        *,
        seed: int = 0,
        experts: int = EXPERTS,
        hidden: int = HIDDEN,
        device: str = DEVICE,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        self.x = normal(tokens, hidden, dtype, device=device, seed=seed)
        ids = torch.randint(-1, experts, (tokens, top_k), dtype=torch.int32, **options)
        self.ids = ids
        self.weights = torch.rand((tokens, top_k), **options) + 0.1

    def __iter__(self) -> Any:
        return iter((self.x, self.ids, self.weights))

    def numpy(self, dtype: Any) -> tuple[Any, Any, Any]:
        return host(self.x).astype(dtype), self.ids.cpu().numpy(), self.weights.cpu().numpy()

    def first(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[:rows], self.ids[:rows], self.weights[:rows]

    def copy_(self, other: "Tokens") -> None:
        for mine, new in zip(self, other, strict=True):
            mine.copy_(new)


class Tiles:
    """Tile lists on the device, with room for any routing of so many ids."""

    def __init__(self, ids: Tensor, block_size: int = 16, experts: int = EXPERTS) -> None:
        self.sizes = {
            "block_size": block_size,
            "top_k": ids.shape[1],
            "num_tokens": ids.shape[0],
        }
        room = ids.numel() + (experts + 1) * block_size
        room -= room % block_size
        self.tokens = torch.full((room,), -1, dtype=torch.int32, device=DEVICE)
        self.owners = torch.full((room // block_size,), -9, dtype=torch.int32, device=DEVICE)
        self.count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self._experts = experts
        self.route(ids)

    def route(self, ids: Tensor) -> None:
        """Takes the lists of other ids, in place."""
        tokens, owners, count = marlinq.moe_align_block_size(
            ids.cpu(), self.sizes["block_size"], self._experts
        )
        self.tokens[: len(tokens)].copy_(tokens)
        self.owners[: len(owners)].copy_(owners)
        self.count.fill_(count)

    def __iter__(self) -> Any:
        return iter((self.tokens, self.owners, self.count))


DISPATCHES = [(3, 20, 0, 13), (0, 0, 13, 7), (7, 33, 20, 30), (3, 1, 50, 1)]

# Every call that takes arrays, as functions of Tokens (64 of them or less) and options.
Call = Callable[..., Tensor]


def calls(stack: marlinq.ExpertStack, block: marlinq.MoeBlock) -> dict[str, Call]:
    def fused(tokens: Tokens, **options: Any) -> Tensor:
        tiles = Tiles(tokens.ids)
        flat = tokens.weights.flatten()
        return stack.gemm_phase_fused(tokens.x, *tiles, **tiles.sizes, topk_weights=flat, **options)

    return {
        "block": lambda tokens, **options: block(*tokens, **options),
        "fused": fused,
        "batched": lambda tokens, **options: stack.gemm_phase_batched(
            tokens.x, [d for d in DISPATCHES if d[1] + d[3] <= len(tokens.x)], **options
        ),
        "expert": lambda tokens, **options: stack[5](tokens.x, **options),
    }


CALLS = ["block", "fused", "batched", "expert"]


@pytest.fixture
def call(request: pytest.FixtureRequest, stack: Any, block: Any) -> Call:
    return calls(stack, block)[request.param]


each_call = pytest.mark.parametrize("call", CALLS, indirect=True)


# --- torch ---


@each_call
@pytest.mark.parametrize("dtype", [*TYPES, "float32"])
def test_torch(call: Call, dtype: str) -> None:
    tokens = Tokens(64, dtype=dtype)
    y = call(tokens)
    assert isinstance(y, torch.Tensor)
    assert (y.dtype, y.device) == (tokens.x.dtype, tokens.x.device)
    for kind in (y.dtype, torch.float32):
        out = torch.empty(y.shape, dtype=kind, device=DEVICE)
        assert call(tokens, out=out) is out
        assert torch.equal(out.to(y.dtype), y)
    with pytest.raises(InvalidArgumentError, match=r"out: .*requires grad"):
        call(tokens, out=torch.empty_like(y).requires_grad_())
    with pytest.raises(InvalidArgumentError, match="out: on cpu, expected cuda:0"):
        call(tokens, out=y.cpu())
    with pytest.raises(InvalidArgumentError, match="context: of backend 'cpu'"):
        call(tokens, context=marlinq.Context("cpu"))
    tokens.x.requires_grad_()
    with pytest.raises(InvalidArgumentError, match=r"x: requires grad.*x\.detach\(\)"):
        call(tokens)
    tokens.x = tokens.x.detach().cpu()
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0"):
        call(tokens)
    with pytest.raises(InvalidArgumentError, match="x: on cpu, expected cuda:0 or a numpy array"):
        call(tokens, out=np.empty(y.shape, np.float32))
    assert torch.equal(call(Tokens(64, dtype=dtype)), y)


def test_refusals_of_blocks(block: marlinq.MoeBlock) -> None:
    tokens = Tokens(5)
    wanted = block(*tokens)
    x = tokens.x
    arguments = {"x": x, "topk_ids": tokens.ids, "topk_weights": tokens.weights}
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"x": x[:, 1:]}, "x: 255 columns, expected 256"),
        ({"x": x.T}, "x: 5 columns|x: stride"),
        ({"x": x.double()}, "x: dtype float64, expected float32"),
        ({"topk_ids": tokens.ids[:4]}, "topk_ids: 4 rows, expected 5 as in x"),
        ({"topk_ids": tokens.ids.float()}, "topk_ids: dtype float32, expected int32 or int64"),
        ({"topk_ids": tokens.ids.repeat(1, 9)}, "topk_ids: top_k = 18, expected 1 to 16"),
        ({"topk_ids": tokens.ids.cpu()}, "topk_ids: on cpu, expected cuda:0"),
        ({"topk_weights": tokens.weights.half()}, "topk_weights: dtype float16, expected float32"),
        ({"topk_weights": tokens.weights[:, 1:]}, "topk_weights: 1 columns, expected 2"),
        ({"topk_weights": tokens.weights.cpu()}, "topk_weights: on cpu, expected cuda:0"),
        ({"topk_weights": tokens.weights.clone().requires_grad_()}, "topk_weights: .*requires gra"),
        ({"shared_output": x[:4]}, "shared_output: 4 rows, expected at least 5"),
        ({"shared_output": x.cpu()}, "shared_output: on cpu, expected cuda:0"),
        ({"residual": x[:4]}, "residual: 4 rows, expected at least 5"),
        ({"residual": x.bfloat16()}, "residual: dtype bfloat16, expected the input's float16"),
        ({"residual": x.cpu()}, "residual: on cpu, expected cuda:0"),
        ({"out": wanted[:4]}, "out: 4 rows, expected at least 5"),
        ({"out": wanted.bfloat16()}, "out: dtype bfloat16, expected the input's float16"),
    ]
    for change, message in refusals:
        with pytest.raises(InvalidArgumentError, match=message):
            block(**(arguments | change))
    assert torch.equal(block(**arguments), wanted)
    with pytest.raises(InvalidArgumentError, match="x: on cuda:0, expected cpu"):
        marlinq.MoeBlock(*load("cpu"))(*tokens)


def test_refusals_of_phases(stack: marlinq.ExpertStack) -> None:
    tokens = Tokens(5)
    tiles = Tiles(tokens.ids)
    arguments: dict[str, Any] = {
        "x": tokens.x,
        "sorted_token_ids": tiles.tokens,
        "expert_ids": tiles.owners,
        "num_tokens_past_padded": tiles.count,
        **tiles.sizes,
    }
    wanted = stack.gemm_phase_fused(**arguments)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"x": tokens.x[:4]}, "x: 4 rows, expected at least 5"),
        ({"block_size": 24}, "block_size: 24, expected 8, 16, 32, 48 or 64"),
        ({"sorted_token_ids": tiles.tokens.cpu()}, "sorted_token_ids: on cpu, expected cuda:0"),
        (
            {"sorted_token_ids": tiles.tokens.long()},
            "sorted_token_ids: dtype int64, expected int32",
        ),
        ({"expert_ids": tiles.owners.cpu()}, "expert_ids: on cpu, expected cuda:0"),
        ({"num_tokens_past_padded": tiles.count.cpu()}, "num_tokens_past_padded: on cpu"),
        ({"num_tokens_past_padded": 17}, "num_tokens_past_padded: 17, expected a multiple of"),
        ({"num_tokens_past_padded": 16000}, "num_tokens_past_padded: 16000, expected a multiple"),
        ({"topk_weights": tokens.weights.cpu().flatten()}, "topk_weights: on cpu"),
        ({"topk_weights": tokens.weights[:4].flatten()}, "topk_weights: 8 elements, expected at"),
        ({"out": wanted[:9]}, "out: 9 rows, expected at least 10"),
    ]
    for change, message in refusals:
        with pytest.raises(InvalidArgumentError, match=message):
            stack.gemm_phase_fused(**(arguments | change))
    assert torch.equal(stack.gemm_phase_fused(**arguments), wanted)
    with pytest.raises(InvalidArgumentError, match=r"dispatches\[0\]: expert 8, expected 0 to 7"):
        stack.gemm_phase_batched(tokens.x, [(8, 0, 0, 1)])
    with pytest.raises(InvalidArgumentError, match=r"dispatches\[0\]: input rows 3 \+ 3 of 5"):
        stack.gemm_phase_batched(tokens.x, [(1, 3, 0, 3)])
    with pytest.raises(InvalidArgumentError, match="expert: 8, expected 0 to 7"):
        stack.expert(8)


def test_a_count_as_an_integer(stack: marlinq.ExpertStack) -> None:
    """As moe_align_block_size returns it on the host; a capture takes it too."""
    tokens = Tokens(33)
    tiles = Tiles(tokens.ids)
    wanted = stack.gemm_phase_fused(tokens.x, *tiles, **tiles.sizes)
    count = int(tiles.count)
    lists = tiles.tokens, tiles.owners
    for number in (count, np.int64(count)):
        y = stack.gemm_phase_fused(tokens.x, *lists, number, **tiles.sizes)
        assert torch.equal(y, wanted)
    own = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=own.cuda_stream)
    torch.cuda.synchronize()
    y = stack.gemm_phase_fused(tokens.x, *lists, count, **tiles.sizes, context=context)
    own.synchronize()
    assert torch.equal(y, wanted)
    out = torch.zeros_like(wanted)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stack.gemm_phase_fused(tokens.x, *lists, count, **tiles.sizes, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            stack.gemm_phase_fused(tokens.x, *lists, count, **tiles.sizes, out=out)
        out.zero_()
        graph.replay()
    stream.synchronize()
    assert torch.equal(out, wanted)


def test_gaps_are_zeros_on_any_stream(stack: marlinq.ExpertStack) -> None:
    tokens = Tokens(64)
    dispatches = [(2, 0, 5, 20), (1, 3, 40, 9)]
    wanted = stack.gemm_phase_batched(tokens.x, dispatches, out_rows=60)
    assert not wanted[:5].any()
    assert not wanted[25:40].any()
    assert not wanted[49:].any()
    assert torch.equal(wanted[5:25], stack.gemm_phase_batched(tokens.x, [(2, 0, 0, 20)]))
    own = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=own.cuda_stream)
    torch.cuda.synchronize()
    for _ in range(20):
        rubbish = torch.full_like(wanted, float("nan"))
        del rubbish  # its memory comes back as the next output
        torch.cuda.synchronize()
        y = stack.gemm_phase_batched(tokens.x, dispatches, out_rows=60, context=context)
        own.synchronize()
        assert torch.equal(y, wanted)


# --- numpy ---


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_numpy_blocks(block: marlinq.MoeBlock, dtype: Any, ids_dtype: type) -> None:
    tokens = Tokens(33, dtype=np.dtype(dtype).name)
    x, ids, weights = tokens.numpy(dtype)
    ids = ids.astype(ids_dtype)
    wanted = host(block(*tokens))
    for rows in (33, 1, 0):
        y = block(x[:rows], ids[:rows], weights[:rows])
        assert isinstance(y, np.ndarray)
        assert (y.dtype, y.shape) == (np.dtype(dtype), (rows, HIDDEN))
        np.testing.assert_array_equal(y.astype(np.float32), host(block(*tokens.first(rows))))
    store = np.full((35, HIDDEN + 9), 7, dtype)
    out = store[1:34, 4 : 4 + HIDDEN]
    frame = np.zeros((66, HIDDEN + 3), dtype)
    frame[::2, 2 : 2 + HIDDEN] = x
    assert block(frame[::2, 2 : 2 + HIDDEN], ids, weights, out=out) is out
    np.testing.assert_array_equal(out.astype(np.float32), wanted)
    residual = x[::-1].copy()
    added = block(*tokens, residual=tokens.x.flip(0), shared_output=tokens.x)
    y = block(x, ids, weights, residual=residual, shared_output=x)
    np.testing.assert_array_equal(y.astype(np.float32), host(added))
    assert block(x, ids, weights, residual=residual, shared_output=x, out=residual) is residual
    np.testing.assert_array_equal(residual.astype(np.float32), host(added))
    out[...] = 7
    assert (store == 7).all()


def test_numpy_beside_torch(block: marlinq.MoeBlock, stack: marlinq.ExpertStack) -> None:
    tokens = Tokens(33)
    x, ids, weights = tokens.numpy(np.float16)
    wanted = block(*tokens)
    assert torch.equal(block(tokens.x, ids, weights), wanted)
    out = torch.empty_like(wanted)
    assert block(x, tokens.ids, tokens.weights, out=out) is out
    assert torch.equal(out, wanted)
    back = np.empty((33, HIDDEN), np.float32)
    assert block(*tokens, out=back) is back
    np.testing.assert_array_equal(back.astype(np.float16), host(wanted).astype(np.float16))

    tiles = Tiles(tokens.ids)
    phase = stack.gemm_phase_fused(tokens.x, *tiles, **tiles.sizes)
    lists = [array.cpu().numpy() for array in tiles]
    y = stack.gemm_phase_fused(x, *lists, **tiles.sizes)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, phase.cpu().numpy())
    assert torch.equal(stack.gemm_phase_fused(tokens.x, *lists, **tiles.sizes), phase)
    y = stack.gemm_phase_fused(x, lists[0], lists[1], int(lists[2][0]), **tiles.sizes)
    np.testing.assert_array_equal(y, phase.cpu().numpy())

    dispatches = [d for d in DISPATCHES if d[1] + d[3] <= 33]
    batched = stack.gemm_phase_batched(tokens.x, dispatches, out_rows=70)
    np.testing.assert_array_equal(
        stack.gemm_phase_batched(x, dispatches, out_rows=70), batched.cpu().numpy()
    )
    kept = np.full((70, 2 * INNER), 7, np.float16)
    stack.gemm_phase_batched(x, dispatches, out=kept)
    named = batched.cpu().numpy()
    written = np.zeros(70, bool)
    for _, _, first, rows in dispatches:
        written[first : first + rows] = True
    np.testing.assert_array_equal(kept[written], named[written])
    assert (kept[~written] == 7).all(), "rows that no dispatch names were written"


def test_numpy_ids_are_checked(block: marlinq.MoeBlock, stack: marlinq.ExpertStack) -> None:
    tokens = Tokens(5)
    x, ids, weights = tokens.numpy(np.float16)
    wrong = ids.copy()
    wrong[3, 1] = 8
    for rows in (x, tokens.x):
        with pytest.raises(
            InvalidArgumentError, match=r"topk_ids: element \[3, 1\] is 8, expected"
        ):
            block(rows, wrong, weights)
    tiles = Tiles(tokens.ids)
    lists = [array.cpu().numpy() for array in tiles]
    for place, index, value, message in (
        (0, 2, -5, r"sorted_token_ids: element \[2\] is -5"),
        (1, 0, 8, r"expert_ids: element \[0\] is 8, expected -1 to 7"),
        (2, 0, 3, "num_tokens_past_padded: 3, expected a multiple of block_size = 16"),
    ):
        changed = [array.copy() for array in lists]
        changed[place][index] = value
        with pytest.raises(InvalidArgumentError, match=message):
            stack.gemm_phase_fused(x, *changed, **tiles.sizes)
    np.testing.assert_array_equal(block(x, ids, weights), block(*tokens).cpu().numpy())


def test_numpy_of_a_repeated_size_allocates_nothing(block: marlinq.MoeBlock) -> None:
    context = marlinq.Context(DEVICE)
    x, ids, weights = Tokens(40).numpy(np.float32)
    block(x, ids, weights, residual=x, context=context)
    grown = context.scratch_allocations
    for rows in (40, 1, 17, 0, 40):
        block(x[:rows], ids[:rows], weights[:rows], residual=x[:rows], context=context)
    assert context.scratch_allocations == grown


def test_numpy_cannot_be_captured(block: marlinq.MoeBlock) -> None:
    tokens = Tokens(4)
    ids = tokens.ids.cpu().numpy()
    out = torch.empty_like(block(*tokens))
    check_refused_in_capture(
        lambda: block(*tokens, out=out),
        lambda: block(tokens.x, ids, tokens.weights, out=out),
        out,
    )
    assert torch.equal(out, block(*tokens))


# --- other libraries ---


@pytest.mark.filterwarnings("ignore")
def test_cupy(block: marlinq.MoeBlock, stack: marlinq.ExpertStack) -> None:
    cupy = pytest.importorskip("cupy")
    tokens = Tokens(33)
    x, ids, weights = (cupy.asarray(array) for array in tokens.numpy(np.float16))
    wanted = block(*tokens).cpu().numpy()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        y = block(x, ids, weights, residual=x * 0)
    stream.synchronize()
    assert isinstance(y, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(y), wanted)
    dispatches = [(2, 0, 5, 20), (1, 3, 40, 9)]
    phase = stack.gemm_phase_batched(tokens.x, dispatches).cpu().numpy()
    np.testing.assert_array_equal(cupy.asnumpy(stack.gemm_phase_batched(x, dispatches)), phase)
    tiles = Tiles(tokens.ids)
    lists = [cupy.asarray(array.cpu().numpy()) for array in tiles]
    fused = stack.gemm_phase_fused(tokens.x, *tiles, **tiles.sizes).cpu().numpy()
    for count in (lists[2], int(lists[2][0])):
        y = stack.gemm_phase_fused(x, lists[0], lists[1], count, **tiles.sizes)
        np.testing.assert_array_equal(cupy.asnumpy(y), fused)


def test_jax() -> None:
    run_with_jax("""
        from gptq_writer import make_layer, stack_arrays
        gate_up, down = (
            marlinq.load_gptq_stacked(
                **stack_arrays([make_layer(n, k, group_size=32, seed=e) for e in range(4)]),
                group_size=32,
                device="cuda",
            )
            for n, k in ((128, 96), (96, 64))
        )
        block = marlinq.MoeBlock(gate_up, down)
        random = np.random.default_rng(1)
        x = random.standard_normal((6, 96)).astype(np.float16)
        ids = random.integers(-1, 4, (6, 2)).astype(np.int32)
        weights = random.random((6, 2)).astype(np.float32)
        wanted = block(x, ids, weights, residual=x)
        sparse = gate_up.gemm_phase_batched(x, [(2, 0, 3, 3)])
        there = [jnp.asarray(array) for array in (x, ids, weights)]
        for _ in range(20):
            y = block(there[0] * 1, there[1] + 0, there[2] * 1, residual=there[0] * 1)
            assert isinstance(y, jax.Array), type(y)
            assert next(iter(y.devices())).platform == "gpu"
            np.testing.assert_array_equal(np.asarray(y + 0), wanted)
            y = gate_up.gemm_phase_batched(there[0] * 1, [(2, 0, 3, 3)])
            np.testing.assert_array_equal(np.asarray(y + 0), sparse)
        lists = marlinq.moe_align_block_size(ids, 8, 4)
        sizes = {"block_size": 8, "top_k": 2, "num_tokens": 6}
        fused = gate_up.gemm_phase_fused(x, *lists, **sizes)
        moved = [jnp.asarray(array) for array in lists[:2]]
        for count in (lists[2], jnp.asarray([lists[2]], jnp.int32)):
            y = gate_up.gemm_phase_fused(there[0] * 1, *moved, count, **sizes)
            np.testing.assert_array_equal(np.asarray(y + 0), fused)
    """)


# --- bits ---


@each_call
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_the_same_bits_every_time(call: Call, tokens: int) -> None:
    for dtype in TYPES:
        case = Tokens(tokens, dtype=dtype, seed=tokens)
        first = call(case)
        same = torch.ones((), dtype=torch.bool, device=DEVICE)
        for _ in range(100):
            same &= (call(case) == first).all()
        assert bool(same), dtype


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_the_same_bits_of_a_large_block(tokens: int) -> None:
    """Products that several blocks of threads share, whichever of them comes first."""
    gate_up = DeviceStack(16, 1024, 2048, act_order=True, seed=3).load()
    block = marlinq.MoeBlock(gate_up, DeviceStack(16, 2048, 512, seed=4).load())
    for dtype in TYPES:
        case = Tokens(tokens, 4, dtype, experts=16, hidden=2048)
        first = block(*case)
        same = torch.ones((), dtype=torch.bool, device=DEVICE)
        for _ in range(100):
            same &= (block(*case) == first).all()
        assert bool(same), dtype


@pytest.mark.parametrize("scales", ["F16", "far apart"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_row_does_not_depend_on_its_batch(act_order: bool, scales: str) -> None:
    scale_dtype = "F16" if scales == "F16" else "F32"
    options = {"act_order": act_order, "bias": True, "scale_dtype": scale_dtype}
    parts = (
        DeviceStack(EXPERTS, 2 * INNER, HIDDEN, seed=5, **options),
        DeviceStack(EXPERTS, HIDDEN, INNER, seed=6, **options),
    )
    if scales == "far apart":  # no quotient of them may be relied on
        for part in parts:
            part.scales[1::2, ::2] *= 2.0**-90
            part.scales[::2, 1::2] *= 2.0**-60
    gate_up, down = (part.load(batch_invariant=True) for part in parts)
    assert gate_up.describe()["batch_invariant"]
    shared = (
        DeviceLayer(96, HIDDEN, group_size=32, seed=7).load(batch_invariant=True),
        DeviceLayer(HIDDEN, 48, group_size=16, seed=8).load(batch_invariant=True),
    )
    reference = Experts(parts[0].dense(), parts[0].bias)
    for block in (
        marlinq.MoeBlock(gate_up, down),
        marlinq.MoeBlock(gate_up, down, shared_expert=shared, shared_gate=np.ones(HIDDEN) / 8),
    ):
        for dtype, tokens in itertools.product(TYPES, (2, 17, 64, 300)):
            case = Tokens(tokens, 3, dtype, seed=tokens)
            whole = block(*case)
            for first, rows in {(0, 1), (tokens // 2, 1), (tokens - 1, 1), (1, tokens - 1)}:
                part = [array[first : first + rows] for array in case]
                what = (dtype, tokens, first, rows)
                assert torch.equal(block(*part), whole[first : first + rows]), what
    for dtype, tokens in itertools.product(TYPES, (17, 300)):
        case = Tokens(tokens, 3, dtype, seed=tokens)
        tiles = Tiles(case.ids, 64)
        whole = gate_up.gemm_phase_fused(case.x, *tiles, **tiles.sizes)
        expected = reference.products(case.x.repeat_interleave(3, 0), case.ids.flatten())
        check_rows(whole, expected, BOUNDS[dtype], (dtype, tokens))
        for block_size, row in ((8, 0), (16, tokens // 2), (64, tokens - 1)):
            alone = Tiles(case.ids[row : row + 1], block_size)
            x = case.x[row : row + 1]
            part = gate_up.gemm_phase_fused(x, *alone, **alone.sizes)
            assert torch.equal(part, whole[3 * row : 3 * row + 3]), (dtype, tokens, row)
        batched = gate_up.gemm_phase_batched(case.x, [(3, 0, 0, tokens)])
        expert = gate_up[3](case.x)
        for row in (0, tokens // 2, tokens - 1):
            part = gate_up.gemm_phase_batched(case.x, [(3, row, 0, 1), (1, 0, 1, 5)])
            assert torch.equal(part[0], batched[row]), (dtype, tokens, row)
            assert torch.equal(gate_up[3](case.x[row]), expert[row]), (dtype, tokens, row)


# --- streams, threads, scratch ---


@each_call
def test_the_current_stream_is_used(call: Call) -> None:
    old, new = Tokens(64, seed=1), Tokens(64, seed=2)
    new.ids = old.ids  # tile lists are made by the host
    new.weights = old.weights
    expected = call(new)
    x = old.x.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(old)  # whatever is made once for a stream
    stream.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(new.x)
        old.x = x
        y = call(old)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_a_block_does_not_wait(block: marlinq.MoeBlock) -> None:
    tokens = Tokens(64)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        block(*tokens)
        stream.synchronize()
        torch.cuda._sleep(100_000_000)
        block(*tokens, residual=tokens.x, shared_output=tokens.x)
    done_at_once = stream.query()
    stream.synchronize()
    assert not done_at_once, "the call waited for the stream"


@each_call
def test_threads_and_streams_share_a_weight(call: Call) -> None:
    tokens = Tokens(64)
    first = call(tokens)
    torch.cuda.synchronize()

    def work(index: int) -> None:
        streams = [torch.cuda.Stream() for _ in range(4)]
        results = []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(call(tokens))
        for stream in streams:
            stream.synchronize()
        assert all(torch.equal(result, first) for result in results), f"thread {index}"

    in_threads(8, work)


def test_threads_load_at_once() -> None:
    gate_up = DeviceStack(EXPERTS, 2 * INNER, HIDDEN, **GATE_UP)
    arrays = gate_up.arrays()
    reference = Experts(gate_up.dense(), gate_up.bias)
    x = normal(40, HIDDEN, "float16")
    owner = torch.arange(40, device=DEVICE) // 5
    expected = reference.products(x, owner)
    torch.cuda.synchronize()

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                stack = gate_up.load(arrays=arrays)
                y = stack.gemm_phase_batched(x, [(e, 5 * e, 5 * e, 5) for e in range(8)])
                check_rows(y, expected, BOUNDS["float16"], f"thread {index}")

    in_threads(6, work)


@each_call
def test_a_repeated_size_allocates_nothing(call: Call) -> None:
    context = marlinq.Context(DEVICE, stream=torch.cuda.current_stream().cuda_stream)
    sizes = (64, 1, 33, 64)
    for tokens in sizes:
        call(Tokens(tokens), context=context)
    torch.cuda.synchronize()
    grown = context.scratch_allocations
    for tokens in sizes:
        call(Tokens(tokens, seed=1), context=context)
    torch.cuda.synchronize()
    assert context.scratch_allocations == grown


def test_a_smaller_block_or_another_routing_allocates_nothing(block: marlinq.MoeBlock) -> None:
    """Scratch is for any routing of as many tokens."""
    context = marlinq.Context(DEVICE, stream=torch.cuda.current_stream().cuda_stream)
    tokens = Tokens(300, 4)
    tokens.ids.fill_(2)
    block(*tokens, context=context)
    grown = context.scratch_allocations
    for rows in (300, 1, 16, 17, 64, 299):
        block(*Tokens(rows, 4, seed=rows), context=context)
    assert context.scratch_allocations == grown


def test_forgotten_stacks_give_their_memory_back() -> None:
    stack = DeviceStack(16, 1024, 1024, group_size=128, seed=8)
    arrays = stack.arrays()
    stack.load(arrays=arrays)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(10):
        stack.load(arrays=arrays)
    assert torch.cuda.mem_get_info()[0] >= free - (4 << 20)


# --- graphs ---


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_capture_as_torch_does_it(block: marlinq.MoeBlock, tokens: int, dtype: str) -> None:
    """Warm up on a stream, capture on another one that torch makes, new inputs, replay."""
    case = Tokens(tokens, dtype=dtype)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=DEVICE)
    stream = torch.cuda.graph.default_capture_stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(*case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(*case)
    for seed in range(5):
        case.copy_(Tokens(tokens, dtype=dtype, seed=seed))
        graph.replay()
        assert torch.equal(y, block(*case))


def test_replays_with_new_routing() -> None:
    """A thousand of them, of a block with everything, and scratch that grows afterwards."""
    parts = (
        DeviceStack(EXPERTS, 2 * INNER, HIDDEN, **GATE_UP),
        DeviceStack(EXPERTS, HIDDEN, INNER, **DOWN),
    )
    gate_up, down = (part.load() for part in parts)
    shared = (
        DeviceLayer(96, HIDDEN, group_size=32, act_order=True, seed=7).load(),
        DeviceLayer(HIDDEN, 48, group_size=16, seed=8).load(),
    )
    gate = np.full(HIDDEN, 0.125, np.float32)
    block = marlinq.MoeBlock(gate_up, down, shared_expert=shared, shared_gate=gate)
    inputs = [Tokens(16, 4, seed=seed) for seed in range(7)]
    inputs[5].ids.fill_(3)
    inputs[6].ids.fill_(-1)
    residual = normal(16, HIDDEN, "float16", seed=99)
    wanted = [block(*case, residual=residual) for case in inputs]
    case = Tokens(16, 4)
    out = torch.empty((16, HIDDEN), dtype=torch.float16, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
        block(*case, residual=residual, out=out, context=context)
        before = context.scratch_allocations
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            block(*case, residual=residual, out=out, context=context)
        assert context.captured
        assert context.scratch_allocations == before
        same = torch.ones((), dtype=torch.bool, device=DEVICE)
        for replay in range(1000):
            case.copy_(inputs[replay % 7])
            graph.replay()
            same &= (out == wanted[replay % 7]).all()
        assert bool(same)
        # The scratch grows afterwards; the graph keeps what it was captured with.
        plain = marlinq.MoeBlock(gate_up, down)
        larger = Tokens(2000, 4, seed=9)
        y = plain(*larger, context=context)
        assert context.scratch_allocations > before
        rubbish = [torch.full((1 << 22,), 7.0, device=DEVICE) for _ in range(8)]
        for replay in range(100):
            case.copy_(inputs[replay % 7])
            graph.replay()
            same &= (out == wanted[replay % 7]).all()
        assert bool(same)
        stream.synchronize()
    assert torch.equal(y, plain(*larger))
    del rubbish


@pytest.mark.parametrize("block_size", [8, 32])
def test_replays_of_phases(stack: marlinq.ExpertStack, block_size: int) -> None:
    """Tile lists written in place between replays; dispatches are part of the graph."""
    inputs = [Tokens(40, 3, seed=seed) for seed in range(4)]
    dispatches = [(7 - e, 5 * e, 5 * e, 5) for e in range(8)]
    routed, wanted = [], []
    for case in inputs:
        tiles = Tiles(case.ids, block_size)
        routed.append(tiles)
        wanted.append(
            (
                stack.gemm_phase_fused(case.x, *tiles, **tiles.sizes),
                stack.gemm_phase_batched(case.x, dispatches),
            )
        )
    x, tiles = inputs[0].x.clone(), Tiles(inputs[0].ids, block_size)
    fused, batched = (torch.empty_like(each) for each in wanted[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):

        def run() -> None:
            stack.gemm_phase_fused(x, *tiles, **tiles.sizes, out=fused)
            stack.gemm_phase_batched(x, dispatches, out=batched)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        for replay in range(100):
            which = replay % len(inputs)
            x.copy_(inputs[which].x)
            for mine, new in zip(tiles, routed[which], strict=True):
                mine.copy_(new)
            graph.replay()
            assert torch.equal(fused, wanted[which][0])
            assert torch.equal(batched, wanted[which][1])
    stream.synchronize()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_graph_from_logits_to_outputs(
    stack: marlinq.ExpertStack, block: marlinq.MoeBlock, tokens: int
) -> None:
    """Router, tile lists, one projection and the block: all of it routes anew in each replay."""
    inputs = [
        (Tokens(tokens, seed=seed).x, normal(tokens, EXPERTS, "float32", seed=seed))
        for seed in range(3)
    ]
    x, logits = (array.clone() for array in inputs[0])

    def run() -> tuple[Tensor, Tensor]:
        ids, weights = marlinq.route(logits, 2)
        lists = marlinq.moe_align_block_size(ids, 16, EXPERTS)
        phase = stack.gemm_phase_fused(x, *lists, block_size=16, top_k=2, num_tokens=tokens)
        return phase, block(x, ids, weights, residual=x)

    wanted = []
    for new_x, new_logits in inputs:
        x.copy_(new_x)
        logits.copy_(new_logits)
        ids, weights = marlinq.route(new_logits.cpu(), 2)
        tiles = Tiles(ids.to(DEVICE))
        phase = stack.gemm_phase_fused(new_x, *tiles, **tiles.sizes)
        got = run()
        assert torch.equal(got[0], phase), "tile lists of the device are others than the host's"
        expected = block(new_x, ids.to(DEVICE), weights.to(DEVICE), residual=new_x)
        check_rows(got[1], expected.double(), BLOCK_BOUNDS["float16"], tokens)
        wanted.append(got)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=DEVICE)
    stream = torch.cuda.graph.default_capture_stream
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for replay in range(30):
        which = replay % len(inputs)
        x.copy_(inputs[which][0])
        logits.copy_(inputs[which][1])
        graph.replay()
        for result, expected in zip(results, wanted[which], strict=True):
            assert torch.equal(result, expected), replay


def test_many_dispatches_in_a_graph(stack: marlinq.ExpertStack) -> None:
    """More than fit into the parameters of a kernel."""
    rows = 3000
    x = normal(rows, HIDDEN, "float16")
    dispatches = [(r * 7 % EXPERTS, rows - 1 - r, r, 1) for r in range(rows)]
    wanted = stack.gemm_phase_batched(x, dispatches)
    out = torch.zeros_like(wanted)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        stack.gemm_phase_batched(x, dispatches, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            stack.gemm_phase_batched(x, dispatches, out=out)
        del dispatches[:]
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, wanted)
    stream.synchronize()


def test_a_capture_without_scratch_says_how_much(block: marlinq.MoeBlock) -> None:
    stream = torch.cuda.Stream()
    context = marlinq.Context(DEVICE, stream=stream.cuda_stream)
    tokens = Tokens(8)
    out = torch.empty_like(tokens.x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out.zero_()  # a graph must hold something
        with pytest.raises(
            InvalidArgumentError, match=r"pregrow_marlin_gather_scratch\(\d+\)"
        ) as raised:
            block(*tokens, out=out, context=context)
    needed = int(str(raised.value).partition("scratch(")[2].partition(")")[0])
    context.pregrow_marlin_gather_scratch(needed)
    grown = context.scratch_allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        block(*tokens, out=out, context=context)
    assert context.scratch_allocations == grown
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, block(*tokens))


# --- devices ---


@needs_two_devices
def test_two_devices_in_one_process() -> None:
    here, there = DEVICES[:2]
    blocks = {device: marlinq.MoeBlock(*load(device)) for device in (here, there)}
    for current, (device, block) in itertools.product(range(2), blocks.items()):
        with torch.cuda.device(current):
            tokens = Tokens(33, device=device)
            y = block(*tokens)
            assert y.device == torch.device(device)
            wanted = blocks[here](*Tokens(33, device=here))
            check_rows(y.to(here), wanted.double(), BLOCK_BOUNDS["float16"], device)
            assert torch.cuda.current_device() == current
    tokens = Tokens(3, device=there)
    with pytest.raises(InvalidArgumentError, match=f"x: on {there}, expected {here}"):
        blocks[here](*tokens)
    with pytest.raises(InvalidArgumentError, match=f"context: on {there}, expected {here}"):
        blocks[here](*tokens, context=marlinq.Context(there))


def test_timing_in_turn(stacks: Any, block: marlinq.MoeBlock) -> None:
    """What bench calls, on buffers of ours."""
    context = marlinq.Context(DEVICE)
    tokens = Tokens(5)
    buffers = []
    for array in tokens:
        buffer = _core.DeviceBuffer(context, array.shape, str(array.dtype).partition(".")[2])
        context.copy(array.cpu().numpy(), buffer)
        buffers.append(buffer)
    x, ids, weights = buffers
    out = _core.DeviceBuffer(context, (5, HIDDEN), "float16")
    handles = [block._handle, marlinq.MoeBlock(*stacks)._handle]
    assert _core.time_blocks(context, handles, x, [ids], weights, out, first=1, count=5) > 0
    assert torch.equal(torch.from_dlpack(out), block(*tokens))
    with pytest.raises(InvalidArgumentError, match="time_blocks: no topk_ids, expected at least"):
        _core.time_blocks(context, handles, x, [], weights, out, first=0, count=1)
    with pytest.raises(InvalidArgumentError, match="time_blocks: 0 handles, first 0, count 1"):
        _core.time_blocks(context, [], x, [ids], weights, out, first=0, count=1)
