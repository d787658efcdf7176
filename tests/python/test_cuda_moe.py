"""Stacks of experts and whole blocks of the CUDA backend against float64; skipped without a device.

References are products of float64 matrices on the device, expert by expert.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from cuda_support import (
    BLOCK_BOUNDS,
    BOUNDS,
    DEVICE,
    TYPES,
    DeviceLayer,
    DeviceStack,
    Experts,
    check_rows,
    guarded,
    needs_device,
    normal,
    torch,
    untouched,
)
from gptq_writer import Layer, make_layer, stack_arrays, with_zeros, write_checkpoint
from marlinq.cli import main
from safetensors.numpy import load_file
from support import DATA

pytestmark = needs_device

Tensor = Any

TOKENS = [0, 1, 3, 17, 64, 257, 4096]
BLOCK_SIZES = [8, 16, 32, 48, 64]
ROUTINGS = ["uniform", "skewed", "single", "absent"]
# Experts: n and k of each. Many experts are small, so that float64 references stay quick.
STACKS = {
    1: (320, 704),
    8: (160, 320),
    60: (96, 256),
    128: (192, 256),
    256: (64, 128),
    512: (48, 64),
    1024: (32, 40),
}
# Experts: hidden and inner size.
BLOCKS = {
    1: (256, 320),
    8: (256, 160),
    60: (128, 96),
    128: (128, 64),
    256: (64, 32),
    512: (64, 32),
    1024: (32, 32),
}


def routing(kind: str, tokens: int, top_k: int, experts: int, seed: int) -> Tensor:
    """int32 ids `[tokens, top_k]`, those of a token distinct where there are enough experts."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    if kind == "single":
        return torch.full((tokens, top_k), experts - 1, dtype=torch.int32, device=DEVICE)
    if experts < top_k:
        ids = torch.randint(0, experts, (tokens, top_k), **options)
    else:
        scores = -torch.log(-torch.log(torch.rand((tokens, experts), **options)))
        if kind == "skewed":
            scores -= 3 * torch.log(1.0 + torch.arange(experts, device=DEVICE))
        ids = scores.topk(top_k, 1).indices
    ids = ids.int()
    if kind == "absent":
        ids[torch.rand((tokens, top_k), **options) < 0.3] = -1
        ids[3::7] = -1
    return ids


def shares(tokens: int, top_k: int, seed: int) -> Tensor:
    """float32 weights `[tokens, top_k]`, none of them small."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    weights = torch.rand((tokens, top_k), generator=generator, device=DEVICE) + 0.1
    return weights / weights.sum(1, keepdim=True)


def tiles_of(ids: Tensor, block_size: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tile lists of ids on the device, followed by numbers that no call may look at."""
    tokens, owners, count = marlinq.moe_align_block_size(ids.cpu(), block_size, experts)
    tail = torch.full((3 * block_size,), -123, dtype=torch.int32)
    lists = torch.cat([tokens, tail]), torch.cat([owners, torch.full((3,), 9999)]).int()
    return (*(each.to(DEVICE) for each in lists), torch.tensor([count]).int().to(DEVICE))


def run_fused(
    stack: marlinq.ExpertStack,
    x: Tensor,
    ids: Tensor,
    block_size: int,
    weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    tokens, top_k = ids.shape
    return stack.gemm_phase_fused(
        x,
        *tiles_of(ids, block_size, stack.num_experts),
        block_size=block_size,
        top_k=top_k,
        num_tokens=tokens,
        topk_weights=None if weights is None else weights.flatten(),
        **options,
    )


def of_layers(layers: list[Layer]) -> Experts:
    """The reference of layers of gptq_writer."""
    dense = torch.from_numpy(np.stack([layer.dense() for layer in layers])).to(DEVICE)
    if layers[0].bias is None:
        return Experts(dense)
    return Experts(dense, torch.from_numpy(np.stack([layer.bias for layer in layers])).to(DEVICE))


def load_layers(layers: list[Layer], layout: str = "gptq", **options: Any) -> marlinq.ExpertStack:
    first = layers[0]
    return marlinq.load_gptq_stacked(
        **stack_arrays(layers, layout),
        bits=first.bits,
        group_size=first.group_size,
        k=first.k,
        checkpoint_format=layout,
        device=DEVICE,
        **options,
    )


def check_stack(stack: marlinq.ExpertStack, reference: Experts, what: object, seed: int) -> None:
    """Both phases and each expert alone, for few and for many rows."""
    experts = stack.num_experts
    for dtype in TYPES:
        x = normal(70, stack.k, dtype, seed=seed)
        for tokens, top_k, block_size in ((1, 2, 8), (17, 2, 16), (70, 3, 64)):
            ids = routing("absent" if tokens > 1 else "uniform", tokens, top_k, experts, seed)
            store, out = guarded(tokens * top_k, stack.n_per_expert, x.dtype)
            run_fused(stack, x[:tokens], ids, block_size, out=out)
            rows, flat = x[:tokens].repeat_interleave(top_k, 0), ids.flatten()
            energy = reference.energy(rows, flat) if out.numel() < 256 else None
            expected = reference.products(rows, flat)
            check_rows(out, expected, BOUNDS[dtype], (what, dtype, tokens), energy)
            assert untouched(store, out), (what, dtype, tokens)
        for expert, m in zip(range(experts), itertools.cycle((1, 16, 70))):
            owner = torch.full((m,), expert, device=DEVICE)
            energy = reference.energy(x[:m], owner) if m * stack.n_per_expert < 256 else None
            expected = reference.products(x[:m], owner)
            y = stack.expert(expert)(x[:m])
            check_rows(y, expected, BOUNDS[dtype], (what, dtype, "expert", expert), energy)
            store, out = guarded(m, stack.n_per_expert, x.dtype)
            stack.gemm_phase_batched(x, [(expert, 0, 0, m)], out=out)
            check_rows(out, expected, BOUNDS[dtype], (what, dtype, "batched", expert), energy)
            assert untouched(store, out), (what, dtype, "batched", expert)


# --- the phases ---


@pytest.mark.parametrize("experts", STACKS)
def test_fused_phase(experts: int) -> None:
    n, k = STACKS[experts]
    stack = DeviceStack(experts, n, k, act_order=True, bias=True, seed=experts)
    loaded, reference = stack.load(), Experts(stack.dense(), stack.bias)
    assert (len(loaded), loaded.k, loaded.n_per_expert) == (experts, k, n)
    top_ks = itertools.cycle((1, 2, 8, 4, 16, 6, 3))
    block_sizes = itertools.cycle(BLOCK_SIZES)
    wide = itertools.cycle((False, False, True))
    for dtype, kind, tokens in itertools.product(TYPES, ROUTINGS, TOKENS):
        top_k, block_size = next(top_ks), next(block_sizes)
        what = f"{dtype}, {kind}, {tokens} tokens, top {top_k}, block size {block_size}"
        ids = routing(kind, tokens, top_k, experts, seed=tokens)
        weights = shares(tokens, top_k, seed=tokens) if top_k > 1 else None
        x = normal(tokens, k, dtype, seed=tokens)
        store, out = guarded(tokens * top_k, n, torch.float32 if next(wide) else x.dtype)
        assert run_fused(loaded, x, ids, block_size, weights, out=out) is out
        expected = reference.products(x.repeat_interleave(top_k, 0), ids.flatten())
        if weights is not None:
            expected *= weights.double().flatten()[:, None]
        check_rows(out, expected, BOUNDS[dtype], what)
        assert untouched(store, out), f"{what}: written outside the output"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_fused_phase_of_rows_of_ids(block_size: int) -> None:
    """As the second product of a block: a row of x for each id, every block size at every load."""
    stack = DeviceStack(8, 192, 256, act_order=True, seed=2)
    loaded, reference = stack.load(), Experts(stack.dense())
    for dtype, kind, rows in itertools.product(TYPES, ROUTINGS, (1, 9, 65, 500)):
        x = normal(rows, 256, dtype, seed=rows)
        ids = routing(kind, rows, 1, 8, seed=rows)
        store, out = guarded(rows, 192, x.dtype)
        run_fused(loaded, x, ids, block_size, out=out)
        what = f"{dtype}, {kind}, {rows} rows"
        energy = reference.energy(x, ids.flatten()) if rows == 1 else None
        check_rows(out, reference.products(x, ids.flatten()), BOUNDS[dtype], what, energy)
        assert untouched(store, out), what


def lists_of_dispatches(rows: int) -> Iterator[tuple[str, list[tuple[int, int, int, int]]]]:
    """Lists over 8 experts, `rows` rows of x and as many output rows, most with gaps."""
    random = np.random.default_rng(rows)
    yield "none", []
    yield "one", [(3, 0, 0, rows)]
    yield "nothing to do", [(1, 0, 0, 0), (2, rows, rows, 0)]
    yield "falling experts", [(7 - e, 20 * e, 20 * (7 - e), 20) for e in range(8)]
    yield "one expert again and again", [(5, 7 * i, 11 * i, 7) for i in range(9)]
    for name, longest in (("single rows", 1), ("many of a few rows", 5), ("long ones", 90)):
        lengths = random.integers(1 if longest == 1 else 0, longest + 1, rows)
        first, dispatches = 0, []
        for length in map(int, lengths):
            if first + length > rows:
                break
            source = int(random.integers(0, rows - length + 1))
            dispatches.append((int(random.integers(0, 8)), source, first, length))
            first += length + int(random.integers(0, 2))
        random.shuffle(dispatches)
        yield name, [tuple(map(int, dispatch)) for dispatch in dispatches]


@pytest.mark.parametrize("rows", [300, 5000])
def test_batched_phase(rows: int) -> None:
    stack = DeviceStack(8, 96, 320, act_order=True, bias=True, seed=3)
    loaded, reference = stack.load(), Experts(stack.dense(), stack.bias)
    for dtype, (name, dispatches) in itertools.product(TYPES, lists_of_dispatches(rows)):
        x = normal(rows, 320, dtype, seed=rows)
        owner = np.full(rows, -1)
        source = np.zeros(rows, np.int64)
        for expert, first, target, count in dispatches:
            owner[target : target + count] = expert
            source[target : target + count] = np.arange(first, first + count)
        owners, sources = (torch.from_numpy(array).to(DEVICE) for array in (owner, source))
        expected = reference.products(x[sources], owners)
        store, out = guarded(rows, 96, x.dtype)
        assert loaded.gemm_phase_batched(x, dispatches, out=out) is out
        named = owners >= 0
        check_rows(out[named], expected[named], BOUNDS[dtype], (name, dtype))
        assert bool((out[~named] == 7).all()), f"{name}: rows that no dispatch names were written"
        assert untouched(store, out), name
        # A new output has zeros there.
        fresh = loaded.gemm_phase_batched(x, dispatches, out_rows=rows)
        check_rows(fresh, expected, BOUNDS[dtype], (name, dtype, "new"))


# --- what experts are made of ---


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 24, 32, 128])
def test_formats(bits: int, group_size: int) -> None:
    """With and without act-order, zero points, biases; each type of scales; both conventions."""
    seeds = itertools.count(bits)
    scale_dtypes = itertools.cycle(["F16", "BF16", "F32"])
    layouts = itertools.cycle(["gptq", "gptq_v2"])
    for symmetric, act_order, bias in itertools.product([False, True], repeat=3):
        options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "act_order": act_order,
            "bias": bias,
            "scale_dtype": next(scale_dtypes),
            "layout": next(layouts),
            "seed": next(seeds),
        }
        stack = DeviceStack(6, 96, 320, **options)
        loaded = stack.load()
        told = loaded.describe()
        # One group leaves nothing to be put in order.
        shuffled = act_order and group_size != -1
        assert (told["act_order"], told["bias"], told["num_experts"]) == (shuffled, bias, 6)
        check_stack(loaded, Experts(stack.dense(), stack.bias), options, seed=bits)


def test_three_bits() -> None:
    layers = [
        make_layer(96, 160, bits=3, group_size=32, symmetric=False, act_order=e % 2 == 1, seed=e)
        for e in range(4)
    ]
    check_stack(load_layers(layers), of_layers(layers), "3 bits", seed=3)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_points_of_every_value(layout: str) -> None:
    """0 included, which the older convention stores as a borrow; others in each expert."""
    layers = []
    for expert in range(3):
        layer = make_layer(96, 128, group_size=32, symmetric=False, seed=expert)
        zeros = (np.arange(4 * 96).reshape(4, 96) + 8 * expert) % 16
        layers.append(with_zeros(layer, zeros))
    check_stack(load_layers(layers, layout), of_layers(layers), layout, seed=4)


@pytest.mark.parametrize("n", [1, 7, 60, 100, 1030])
@pytest.mark.parametrize("k", [1, 33, 100, 1000])
def test_odd_shapes(n: int, k: int) -> None:
    stack = DeviceStack(5, n, k, act_order=k > 1, bias=True, seed=n + k)
    check_stack(stack.load(), Experts(stack.dense(), stack.bias), f"n {n}, k {k}", seed=n)


def test_an_expert_is_the_same_layer_loaded_alone() -> None:
    """The same bits, from the same packed bytes."""
    stack = DeviceStack(6, 160, 320, act_order=True, bias=True, seed=5)
    loaded, lists = stack.load(), stack.arrays()
    alone = [
        marlinq.load_gptq(
            lists["qweights"][e],
            *(lists[name][e] for name in ("scales", "qzeros", "g_idx", "bias")),
            group_size=stack.group_size,
            checkpoint_format="gptq",
            device=DEVICE,
        )
        for e in range(6)
    ]
    for dtype, m in itertools.product(TYPES, (1, 16, 17, 64, 300)):
        x = normal(m, 320, dtype, seed=m)
        for expert, linear in enumerate(alone):
            assert torch.equal(loaded[expert](x), linear(x)), (dtype, m, expert)
    view = loaded.expert(3)
    del loaded
    x = normal(9, 320, "float16")
    assert torch.equal(view(x), alone[3](x)), "a view did not outlive its stack"


GATE_ORDERS = [
    ("shuffled", "shuffled", False),  # orders of their own
    ("shuffled", "the same", False),
    ("none", "shuffled", False),
    ("none", "none", True),
    ("shuffled", "shuffled", True),
    ("none", "the same", False),
]


def fused_layers(n: int, k: int, **options: Any) -> list[tuple[Layer, Layer]]:
    """gate and up of an expert for each of GATE_ORDERS: order of gate, order of up, symmetric."""
    layers = []
    for expert, (gate, up, symmetric) in enumerate(GATE_ORDERS):
        common = {"group_size": 32, "symmetric": symmetric} | options
        first = make_layer(n, k, act_order=gate == "shuffled", seed=10 + expert, **common)
        second = make_layer(n, k, act_order=up == "shuffled", seed=30 + expert, **common)
        if up == "the same":
            second = replace(second, groups=first.groups)
        layers.append((first, second))
    return layers


@pytest.mark.parametrize("scale_dtype", ["F16", "F32"])
@pytest.mark.parametrize("n", [64, 50])
def test_gate_and_up_of_different_orders(scale_dtype: str, n: int, tmp_path: Path) -> None:
    parts = fused_layers(n, 160, bias=True, scale_dtype=scale_dtype)
    down = [make_layer(160, n, group_size=16, act_order=e % 2 == 0, seed=60 + e) for e in range(6)]
    modules = {}
    for expert, (gate, up) in enumerate(parts):
        prefix = f"m.experts.{expert}"
        modules |= {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up}
        modules[f"{prefix}.down_proj"] = down[expert]
    checkpoint = marlinq.open(
        write_checkpoint(tmp_path, modules, config={"model_type": "qwen3_moe"})
    )
    stack = checkpoint.expert_stack("m.experts", ["gate_proj", "up_proj"], device=DEVICE)
    assert stack.describe()["fused"] == [n, n]
    halves = [of_layers([pair[half] for pair in parts]) for half in range(2)]
    both = Experts(
        torch.cat([half.dense for half in halves], 1), torch.cat([half.bias for half in halves], 1)
    )
    check_stack(stack, both, scale_dtype, seed=6)
    block = checkpoint.moe("m", device=DEVICE)
    for dtype, tokens in itertools.product(TYPES, (1, 17, 200)):
        case = Case(dtype, "absent", tokens, 2, 6, 160)
        case.check(block, both, of_layers(down))


# --- whole blocks ---


def _clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, u: g * torch.sigmoid(g) * u,
    "gelu": lambda g, u: 0.5 * g * (1 + torch.erf(g / 2**0.5)) * u,
    "gelu_tanh": lambda g, u: (
        0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u
    ),
    "clamped_swiglu": _clamped,
}


class Case:
    """Tokens of a block and their routing."""

    def __init__(
        self, dtype: str, kind: str, tokens: int, top_k: int, experts: int, hidden: int
    ) -> None:
        self.dtype = dtype
        self.x = normal(tokens, hidden, dtype, seed=tokens)
        self.ids = routing(kind, tokens, top_k, experts, seed=tokens)
        self.weights = shares(tokens, top_k, seed=tokens)
        self.what = f"{dtype}, {kind}, {tokens} tokens, top {top_k} of {experts}"

    def expected(
        self,
        gate_up: Experts,
        down: Experts,
        activation: str = "silu",
        router_weight: str = "output",
        added: Tensor | float = 0.0,
    ) -> Tensor:
        """The block by its definition, in float64."""
        tokens, top_k = self.ids.shape
        rows = self.x.double().repeat_interleave(top_k, 0)
        weights, flat = self.weights.double().flatten()[:, None], self.ids.flatten()
        if router_weight == "input":
            rows = rows * weights
        hidden = ACTIVATIONS[activation](*gate_up.products(rows, flat).chunk(2, 1))
        outputs = down.products(hidden, flat)
        if router_weight == "output":
            outputs = outputs * weights
        return outputs.view(tokens, top_k, outputs.shape[1]).sum(1) + added

    def run(self, block: marlinq.MoeBlock, wide: bool = False, **options: Any) -> Tensor:
        """Runs the block between guard elements."""
        kind = torch.float32 if wide else self.x.dtype
        store, out = guarded(len(self.x), block.hidden_size, kind)
        assert block(self.x, self.ids, self.weights, out=out, **options) is out
        result = out.clone()
        assert untouched(store, out), f"{self.what}: written outside the output"
        return result

    def check(
        self, block: marlinq.MoeBlock, gate_up: Experts, down: Experts, **options: Any
    ) -> None:
        expected = self.expected(gate_up, down, **options)
        check_rows(self.run(block), expected, BLOCK_BOUNDS[self.dtype], self.what)


class Parts:
    """Stacks of a block and their references."""

    def __init__(self, experts: int, hidden: int, inner: int, **options: Any) -> None:
        self.hidden = hidden
        self.stacks = (
            DeviceStack(experts, 2 * inner, hidden, seed=experts + 1, **options),
            DeviceStack(experts, hidden, inner, seed=experts + 2, **options),
        )
        self.gate_up, self.down = (Experts(each.dense(), each.bias) for each in self.stacks)

    def load(self, **options: Any) -> tuple[marlinq.ExpertStack, marlinq.ExpertStack]:
        gate_up, down = (each.load(**options) for each in self.stacks)
        return gate_up, down


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(8, 256, 160, act_order=True, bias=True)


@pytest.fixture(scope="module")
def stacks(parts: Parts) -> tuple[marlinq.ExpertStack, marlinq.ExpertStack]:
    return parts.load()


@pytest.mark.parametrize("experts", BLOCKS)
def test_blocks(experts: int) -> None:
    hidden, inner = BLOCKS[experts]
    parts = Parts(experts, hidden, inner, act_order=True)
    block = marlinq.MoeBlock(*parts.load())
    assert (block.device, block.hidden_size, block.num_experts) == (DEVICE, hidden, experts)
    top_ks = itertools.cycle((8, 1, 2, 16, 4, 6, 3))
    long_ids = itertools.cycle((False, False, True))
    for dtype, kind, tokens in itertools.product(TYPES, ROUTINGS, TOKENS):
        case = Case(dtype, kind, tokens, next(top_ks), experts, hidden)
        if next(long_ids):
            case.ids = case.ids.long()
        case.check(block, parts.gate_up, parts.down)


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_top_k(
    top_k: int, parts: Parts, stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]
) -> None:
    block = marlinq.MoeBlock(*stacks)
    for dtype, tokens in itertools.product(TYPES, (1, 33, 150)):
        Case(dtype, "absent", tokens, top_k, 8, 256).check(block, parts.gate_up, parts.down)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router_weight", ["output", "input"])
def test_activations(
    activation: str,
    router_weight: str,
    parts: Parts,
    stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack],
) -> None:
    options = {"activation": activation, "router_weight": router_weight}
    block = marlinq.MoeBlock(*stacks, **options)
    for dtype, kind, tokens in itertools.product(TYPES, ("uniform", "single"), (1, 17, 257)):
        case = Case(dtype, kind, tokens, 2, 8, 256)
        if tokens == 17:
            case.x *= 3  # beyond the limits of the clamped one
        case.check(block, parts.gate_up, parts.down, **options)


def test_clamping_happens(parts: Parts) -> None:
    x = 3 * normal(17, 256, "float16", seed=17).double()
    gate, up = parts.gate_up.products(x, torch.zeros(17, device=DEVICE)).chunk(2, 1)
    assert bool((gate > 7).any())
    assert bool((up > 7).any())
    assert bool((up < -7).any())


def shared_layers() -> tuple[DeviceLayer, DeviceLayer]:
    options: dict[str, Any] = {"group_size": 32, "act_order": True, "bias": True}
    return DeviceLayer(144, 256, seed=41, **options), DeviceLayer(256, 72, seed=42, **options)


def shared_reference(x: Tensor, activation: str = "silu") -> Tensor:
    gate_up, down = (Experts(layer.dense()[None], layer.bias[None]) for layer in shared_layers())
    owner = torch.zeros(len(x), device=DEVICE)
    hidden = ACTIVATIONS[activation](*gate_up.products(x, owner).chunk(2, 1))
    return down.products(hidden, owner)


@pytest.mark.parametrize("gate", [None, "float32", "float16"])
@pytest.mark.parametrize("kind", ["linears", "callable"])
def test_shared_expert(
    gate: str | None,
    kind: str,
    parts: Parts,
    stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack],
) -> None:
    vector = None if gate is None else normal(1, 256, gate, seed=43) / 8
    gate_up, down = (layer.load() for layer in shared_layers())
    calls: list[Tensor] = []

    def shared(x: Tensor) -> Tensor:
        calls.append(x)
        return shared_reference(x).float()

    for activation in ("silu", "gelu") if kind == "linears" else ("silu",):
        block = marlinq.MoeBlock(
            *stacks,
            activation=activation,
            shared_expert=(gate_up, down) if kind == "linears" else shared,
            shared_gate=None if vector is None else vector.cpu(),
        )
        for dtype, tokens in itertools.product(TYPES, (1, 17, 257)):
            case = Case(dtype, "absent", tokens, 2, 8, 256)
            output = shared_reference(case.x, activation)
            if vector is not None:
                output *= torch.sigmoid(case.x.double() @ vector.double().T)
            options = {"activation": activation, "added": output}
            case.check(block, parts.gate_up, parts.down, **options)
            assert len(calls) == 0 or calls.pop() is case.x


@pytest.mark.parametrize("router_weight", ["output", "input"])
def test_shared_output_and_residual(
    router_weight: str, parts: Parts, stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]
) -> None:
    block = marlinq.MoeBlock(*stacks, router_weight=router_weight)
    for dtype, tokens in itertools.product(TYPES, (1, 17, 257)):
        case = Case(dtype, "absent", tokens, 2, 8, 256)
        for kind in (dtype, "float32"):
            residual = normal(tokens, 256, kind, seed=51)
            shared = normal(tokens, 256, "float32" if kind == dtype else dtype, seed=52)
            added = residual.double() + shared.double()
            expected = case.expected(
                parts.gate_up, parts.down, router_weight=router_weight, added=added
            )
            for wide in (False, True):
                y = case.run(block, wide, residual=residual, shared_output=shared)
                check_rows(y, expected, BLOCK_BOUNDS[dtype], (case.what, kind, wide))
            # The stream of residuals itself may be the output.
            y = residual.clone()
            block(case.x, case.ids, case.weights, residual=y, out=y, shared_output=shared)
            check_rows(y, expected, BLOCK_BOUNDS[dtype], (case.what, kind, "in place"))


def test_types_of_outputs(stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]) -> None:
    """One rounding at the end: that of the float32 output is the other one."""
    block = marlinq.MoeBlock(*stacks)
    for dtype, tokens in itertools.product(TYPES, (1, 17, 257)):
        case = Case(dtype, "absent", tokens, 2, 8, 256)
        assert torch.equal(case.run(block, wide=True).to(case.x.dtype), case.run(block))
    # float32 inputs are rounded to float16.
    case = Case("float32", "uniform", 33, 2, 8, 256)
    y = block(case.x, case.ids, case.weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, block(case.x.half().float(), case.ids, case.weights))


def test_strides(stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]) -> None:
    """Rows, ids and weights inside larger matrices, at any address."""
    gate_up, down = stacks
    block = marlinq.MoeBlock(gate_up, down)
    for dtype in TYPES:
        case = Case(dtype, "absent", 33, 4, 8, 256)
        wanted = case.run(block)
        phase = run_fused(gate_up, case.x, case.ids, 16)
        ids = torch.full((33, 9), 99, dtype=torch.int32, device=DEVICE)
        weights = torch.full((33, 11), float("nan"), device=DEVICE)
        ids[:, 3:7], weights[:, 5:9] = case.ids, case.weights
        for stride, offset in ((264, 8), (256, 1), (257, 0), (259, 3)):
            memory = torch.zeros(34 * stride + offset, dtype=case.x.dtype, device=DEVICE)
            x = memory[offset : offset + 33 * stride].view(33, stride)[:, :256]
            x.copy_(case.x)
            for out_offset in (1, 8):
                store, out = guarded(33, 256, x.dtype, out_offset)
                block(x, ids[:, 3:7], weights[:, 5:9], out=out)
                assert torch.equal(out, wanted), (dtype, stride, offset)
                assert untouched(store, out)
            assert torch.equal(run_fused(gate_up, x, case.ids, 16), phase), (dtype, stride, offset)


def test_ids_that_are_no_experts_count_as_absent(
    stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack],
) -> None:
    """The host does not look at ids on the device, and no id may reach memory that is not there."""
    block = marlinq.MoeBlock(*stacks)
    case = Case("float16", "absent", 33, 4, 8, 256)
    wanted = case.run(block)
    for number in (8, 1 << 30, -2, -(1 << 31)):
        wrong = torch.where(case.ids < 0, number, case.ids)
        assert torch.equal(block(case.x, wrong.int(), case.weights), wanted), number
    wide = torch.where(case.ids < 0, 1 << 33, case.ids.long())
    assert torch.equal(block(case.x, wide, case.weights), wanted)


def test_no_expert_here_gives_zeros(
    stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack],
) -> None:
    block = marlinq.MoeBlock(*stacks)
    ids = torch.full((5, 2), -1, dtype=torch.int32, device=DEVICE)
    out = torch.full((5, 256), float("nan"), dtype=torch.float16, device=DEVICE)
    block(normal(5, 256, "float16"), ids, shares(5, 2, 1), out=out)
    assert not out.any()


@pytest.fixture(scope="module")
def real_layer() -> tuple[Parts, marlinq.MoeBlock]:
    """Sizes of Qwen3-30B-A3B."""
    parts = Parts(128, 2048, 768, group_size=128, symmetric=True)
    return parts, marlinq.MoeBlock(*parts.load())


@pytest.mark.parametrize("kind", ROUTINGS)
def test_a_layer_of_a_real_model(kind: str, real_layer: tuple[Parts, marlinq.MoeBlock]) -> None:
    parts, block = real_layer
    for tokens, dtype in zip((1, 5, 64, 300), TYPES * 2, strict=True):
        case = Case(dtype, kind, tokens, 8, 128, 2048)
        case.check(block, parts.gate_up, parts.down)


@pytest.mark.parametrize("symmetric", [True, False])
def test_short_groups(symmetric: bool) -> None:
    """Several groups in what a tile multiplies between two waits."""
    parts = Parts(6, 512, 384, group_size=32, symmetric=symmetric)
    block = marlinq.MoeBlock(*parts.load())
    for tokens, dtype in zip((3, 40, 300, 900), TYPES * 2, strict=True):
        case = Case(dtype, "uniform", tokens, 2, 6, 512)
        case.check(block, parts.gate_up, parts.down)


@pytest.fixture(scope="module")
def large_layer() -> tuple[Parts, marlinq.MoeBlock]:
    """Of a few tokens for each expert blocks share units along K."""
    parts = Parts(16, 4096, 4096, group_size=128, symmetric=True)
    return parts, marlinq.MoeBlock(*parts.load())


@pytest.mark.parametrize("tokens", [3, 8, 9])
def test_a_layer_of_large_experts(tokens: int, large_layer: tuple[Parts, marlinq.MoeBlock]) -> None:
    parts, block = large_layer
    for kind, dtype in zip(ROUTINGS, TYPES * 2, strict=True):
        case = Case(dtype, kind, tokens, 4, 16, 4096)
        case.check(block, parts.gate_up, parts.down)


def test_fewer_tokens_of_large_experts_allocate_nothing(
    large_layer: tuple[Parts, marlinq.MoeBlock],
) -> None:
    _, block = large_layer
    context = marlinq.Context(DEVICE, stream=torch.cuda.current_stream().cuda_stream)
    for tokens in (9, 8, 3, 1):
        case = Case("float16", "uniform", tokens, 4, 16, 4096)
        case.run(block, context=context)
        if tokens == 9:
            grown = context.scratch_allocations
    assert context.scratch_allocations == grown


# --- stored checkpoints ---


def moe_blocks() -> list[tuple[str, str]]:
    """(checkpoint, prefix) of every block of tests/data."""
    found = set()
    for path in sorted(DATA.glob("*/expected.safetensors")):
        for info in marlinq.open(path.parent).modules():
            prefix, experts, _ = info.name.partition(".experts.")
            if experts:
                found.add((path.parent.name, prefix))
    return sorted(found)


@pytest.mark.parametrize(("name", "prefix"), moe_blocks())
def test_stored_checkpoints(name: str, prefix: str) -> None:
    """Stacks and block against float64, and against what another program computed."""
    checkpoint = marlinq.open(DATA / name)
    block = checkpoint.moe(prefix, device=DEVICE)
    experts, hidden = block.num_experts, block.hidden_size

    def reference(part: str) -> Tensor:
        weights = [
            checkpoint.reference(f"{prefix}.experts.{e}.{part}").dequantize(np.float64)
            for e in range(experts)
        ]
        return torch.from_numpy(np.stack(weights)).to(DEVICE)

    gate_up = Experts(torch.cat([reference("gate_proj"), reference("up_proj")], 1))
    down = Experts(reference("down_proj"))
    stack = checkpoint.expert_stack(f"{prefix}.experts", ["gate_proj", "up_proj"], device=DEVICE)
    check_stack(stack, gate_up, name, seed=7)
    stack = checkpoint.expert_stack(f"{prefix}.experts", "down_proj", device=DEVICE)
    check_stack(stack, down, name, seed=8)
    for dtype, tokens in itertools.product(TYPES, (1, 5, 33, 400)):
        Case(dtype, "absent", tokens, 2, experts, hidden).check(block, gate_up, down)

    stored = load_file(DATA / name / "expected.safetensors")
    for dtype, tokens in itertools.product(TYPES, (1, 5, 33)):
        x = torch.from_numpy(stored[f"{prefix}.x{tokens}"]).to(DEVICE)
        ids, weights = (
            torch.from_numpy(stored[f"{prefix}.topk_{what}{tokens}"]).to(DEVICE)
            for what in ("ids", "weights")
        )
        y = block(x.to(getattr(torch, dtype)), ids, weights)
        wanted = torch.from_numpy(stored[f"{prefix}.y{tokens}"]).to(DEVICE).double()
        # The stored x is float32: rounding it adds an error like the output's own.
        error = torch.linalg.norm(y.double() - wanted) / torch.linalg.norm(wanted)
        assert float(error) <= 2 * BLOCK_BOUNDS[dtype], (dtype, tokens, float(error))


def test_description(stacks: tuple[marlinq.ExpertStack, marlinq.ExpertStack]) -> None:
    gate_up, down = stacks
    told = gate_up.describe()
    assert (told["backend"], told["device"]) == ("cuda", DEVICE)
    assert told["compute"] == "float16 or bfloat16"
    assert (told["k"], told["n"], told["num_experts"], told["group_size"]) == (256, 320, 8, 32)
    assert told["act_order"]
    assert told["bias"]
    assert told["packed_bytes"] >= 8 * 256 * 320 // 2
    assert told["schedule"]
    assert f"8 x 256 -> 320, 4 bits, group 32, act_order, bias, {DEVICE}" in repr(gate_up)
    one = gate_up.expert(1).describe()
    assert (one["k"], one["n"], one["num_experts"]) == (256, 320, 1)
    assert one["compute"] == told["compute"]
    assert f"8 experts, hidden 256, inner 160, silu, 4 bits, {DEVICE}" in repr(
        marlinq.MoeBlock(gate_up, down)
    )


def test_bench_of_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "0.01", "--rows", "1,17", "--device", "cuda", "--json"]
    assert main(["bench", "--moe", "16,2,256,128", "4,1,128,64", *options]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["device"] == DEVICE
    assert timed["memory_gb_per_second"] > 0
    assert [(row["experts"], row["m"]) for row in timed["results"]] == [
        (16, 1),
        (16, 17),
        (4, 1),
        (4, 17),
    ]
    for row in timed["results"]:
        assert (row["device"], row["compute"]) == (DEVICE, "float16")
        assert row["seconds"] > 0
