"""marlinq among the rivals: a plug-in for a harness that times int4 GEMMs of others.

The harness imports `extra_*.py` from folders that it is told of. A peer has a name, a version, the
dtypes it takes, and `prepare(n, k, q, s, dtype, copies)`, which gets codes q `[k, n]` (uint8, zero
point 8) and scales s `[k / 128, n]` and returns functions of x, one for each copy of the weight.

The peers of mixture-of-experts products get q `[E, k, n]`; their `fn(copy, x, ids, kind)` returns a
function of nothing that gives a row `[n]` for each of the ids `[T, top_k]`: of the token's row of x
where kind is "up", of a row of its own where it is "down". Those of blocks get q and s of gate_up
and of down; theirs is `fn(copy, x, ids, weights)`. After a run the harness deletes the attributes W
and a.
"""

from collections.abc import Callable

import marlinq
import torch

MOST_ROWS = 8192  # of x
OPTIONS = {"bits": 4, "checkpoint_format": "gptq_v2", "device": "cuda:0"}


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Eight codes an int32 along the second last dimension, the first in the lowest bits."""
    *lead, rows, columns = values.shape
    packed = torch.zeros((*lead, rows // 8, columns), dtype=torch.int32, device=values.device)
    for i in range(8):
        packed |= values[..., i::8, :].to(torch.int32) << (4 * i)
    return packed


def _grow_scratch_of_captures(run: Callable[[], object]) -> None:
    """Runs something on the stream that torch captures on: scratch cannot grow in a capture."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
        run()
    torch.cuda.synchronize()


class Marlinq:
    """Layers of marlinq: with zero points of 8 or others, and with input rows in any order."""

    version = "marlinq " + marlinq.__version__
    dtypes = ("fp16", "bf16")

    def __init__(
        self, kernel: str | None = None, *, asymmetric: bool = False, act_order: bool = False
    ) -> None:
        self.kernel = kernel
        self.asymmetric = asymmetric
        self.act_order = act_order
        parts = {kernel: kernel is not None, "asym": asymmetric, "act-order": act_order}
        self.name = "-".join(["marlinq", *(str(part) for part, there in parts.items() if there)])

    def prepare(
        self, n: int, k: int, q: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, copies: int
    ) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        groups = s.shape[0]
        zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=q.device)
        group_of_row = torch.arange(k, device=q.device) // (k // groups)
        generator = torch.Generator(device=q.device).manual_seed(7)
        if self.asymmetric:
            zeros.random_(4, 12, generator=generator)
        if self.act_order:
            group_of_row = group_of_row[torch.randperm(k, device=q.device, generator=generator)]
        if self.asymmetric or self.act_order:
            self.own_ref = lambda x: (
                x.float() @ ((q.float() - zeros[group_of_row].float()) * s[group_of_row].float())
            )
        tensors = {
            "qweight": _pack(q).cpu(),
            "scales": s.cpu(),
            "qzeros": _pack(zeros.t().contiguous()).t().contiguous().cpu(),
        }
        if self.act_order:
            tensors["g_idx"] = group_of_row.int().cpu()
        options = OPTIONS | {"group_size": k // groups, "kernel": self.kernel}
        layers = [marlinq.load_gptq(**tensors, **options) for _ in range(copies)]
        if self.act_order:
            most = torch.zeros(MOST_ROWS, k, dtype=dtype, device="cuda")
            _grow_scratch_of_captures(lambda: layers[0](most))
        return layers


def _load_stacks(
    q: torch.Tensor, s: torch.Tensor, kernel: str | None, copies: int
) -> list[marlinq.ExpertStack]:
    """Copies of a stack: each has memory of its own, and they hold the same."""
    qweights, scales = list(_pack(q).cpu()), list(s.cpu())
    options = OPTIONS | {"group_size": q.shape[1] // s.shape[1], "kernel": kernel}
    return [marlinq.load_gptq_stacked(qweights, scales, **options) for _ in range(copies)]


class _Experts:
    """What the peers of products and of blocks share."""

    version = Marlinq.version
    dtypes = Marlinq.dtypes

    def __init__(self, kernel: str | None = None) -> None:
        self.kernel = kernel
        self.name = "-".join(["marlinq", *([] if kernel is None else [kernel])])
        self._most = 0

    def _ready(
        self, ids: torch.Tensor, run: Callable[[], torch.Tensor]
    ) -> Callable[[], torch.Tensor]:
        """Makes room for so many ids, once."""
        if ids.numel() > self._most:
            _grow_scratch_of_captures(run)
            self._most = ids.numel()
        return run


class MarlinqExperts(_Experts):
    """The product of a stack, through tile lists that are made before."""

    def prepare(
        self,
        _experts: int,
        _n: int,
        _k: int,
        q: torch.Tensor,
        s: torch.Tensor,
        _dtype: torch.dtype,
        copies: int,
    ) -> None:
        self._most = 0
        self.W = _load_stacks(q, s, self.kernel, copies)

    def fn(
        self, copy: int, x: torch.Tensor, ids: torch.Tensor, kind: str
    ) -> Callable[[], torch.Tensor]:
        stack = self.W[copy]
        count, experts = ids.numel(), stack.num_experts
        sizes = (8, 16, 32, 48, 64)
        block_size = next((size for size in sizes if count / experts / size < 0.9), sizes[-1])
        tokens, owners, entries = marlinq.moe_align_block_size(ids.cpu(), block_size, experts)
        lists = tokens.cuda(), owners.cuda(), torch.tensor([entries]).int().cuda()
        top_k = ids.shape[1] if kind == "up" else 1
        options = {"block_size": block_size, "top_k": top_k, "num_tokens": count // top_k}
        return self._ready(ids, lambda: stack.gemm_phase_fused(x, *lists, **options))


class MarlinqBlock(_Experts):
    """A whole block."""

    def prepare(
        self,
        _experts: int,
        _top_k: int,
        _hidden: int,
        _inner: int,
        gate_up: tuple[torch.Tensor, torch.Tensor],
        down: tuple[torch.Tensor, torch.Tensor],
        _dtype: torch.dtype,
        copies: int,
    ) -> None:
        self._most = 0
        stacks = (_load_stacks(*part, self.kernel, copies) for part in (gate_up, down))
        self.a = [marlinq.MoeBlock(*pair) for pair in zip(*stacks, strict=True)]

    def fn(
        self, copy: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        block = self.a[copy]
        return self._ready(ids, lambda: block(x, ids, weights))


PEERS = {
    "marlinq": lambda _: [Marlinq()],
    "marlinq-sm80": lambda _: [Marlinq("sm80")],
    "marlinq-sm80-asym": lambda _: [Marlinq("sm80", asymmetric=True)],
    "marlinq-sm80-act-order": lambda _: [Marlinq("sm80", act_order=True)],
    "marlinq-sm90": lambda _: [Marlinq("sm90")],
    "marlinq-sm90-asym": lambda _: [Marlinq("sm90", asymmetric=True)],
    "marlinq-sm90-act-order": lambda _: [Marlinq("sm90", act_order=True)],
}
MOE_PEERS = {
    "marlinq": lambda _: [MarlinqExperts()],
    "marlinq-sm80": lambda _: [MarlinqExperts("sm80")],
}
BLOCK_PEERS = {
    "marlinq": lambda _: [MarlinqBlock()],
    "marlinq-sm80": lambda _: [MarlinqBlock("sm80")],
}
