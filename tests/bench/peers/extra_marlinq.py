"""marlinq among the rivals: a plug-in for a harness that times int4 GEMMs of others.

The harness imports `extra_*.py` from folders that it is told of. A peer has a name, a version, the
dtypes it takes, and `prepare(n, k, q, s, dtype, copies)`, which gets codes q `[k, n]` (uint8, zero
point 8) and scales s `[k / 128, n]` and returns functions of x, one for each copy of the weight.
"""

from collections.abc import Callable

import marlinq
import torch

MOST_ROWS = 8192  # of x


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Eight codes an int32 along the first dimension, the first in the lowest bits."""
    packed = torch.zeros(
        (values.shape[0] // 8, values.shape[1]), dtype=torch.int32, device=values.device
    )
    for i in range(8):
        packed |= values[i::8].to(torch.int32) << (4 * i)
    return packed


def _grow_scratch_of_captures(layer: marlinq.Linear, dtype: torch.dtype) -> None:
    """Runs the most rows on the stream that torch captures on: scratch cannot grow in a capture."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
        layer(torch.zeros(MOST_ROWS, layer.in_features, dtype=dtype, device="cuda"))
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
        options = {
            "bits": 4,
            "group_size": k // groups,
            "checkpoint_format": "gptq_v2",
            "device": "cuda:0",
            "kernel": self.kernel,
        }
        layers = [marlinq.load_gptq(**tensors, **options) for _ in range(copies)]
        if self.act_order:
            _grow_scratch_of_captures(layers[0], dtype)
        return layers


PEERS = {
    "marlinq": lambda _: [Marlinq()],
    "marlinq-sm80": lambda _: [Marlinq("sm80")],
    "marlinq-sm80-asym": lambda _: [Marlinq("sm80", asymmetric=True)],
    "marlinq-sm80-act-order": lambda _: [Marlinq("sm80", act_order=True)],
}
