"""marlinq among the rivals: a plug-in for a harness that times int4 GEMMs of others.

The harness imports `extra_*.py` from folders that it is told of. A peer has a name, a version, the dtypes it takes,
and `prepare(N, K, q, s, dtype, nc)`, which gets codes q `[K, N]` (uint8, zero point 8) and scales s `[K / 128, N]` and
returns nc functions of x, one for each copy of the weight.
"""

import torch

import marlinq

MOST_ROWS = 8192

def _pack(values: torch.Tensor) -> torch.Tensor:
    """Eight codes an int32 along the first dimension, the first in the lowest bits."""
    packed = torch.zeros((values.shape[0] // 8, values.shape[1]), dtype=torch.int32, device=values.device)
    for i in range(8):
        packed |= values[i::8].to(torch.int32) << (4 * i)
    return packed


class Marlinq:
    """Layers of marlinq: with zero points of 8 or other ones, and with rows of the weight in any order."""

    version = "marlinq " + marlinq.__version__
    dtypes = ("fp16", "bf16")

    def __init__(self, kernel: str | None = None, *, asymmetric: bool = False, act_order: bool = False) -> None:
        self.kernel = kernel
        self.asymmetric = asymmetric
        self.act_order = act_order
        self.name = "-".join(
            ["marlinq", *([kernel] if kernel else []), *["asym"] * asymmetric, *["act-order"] * act_order]
        )

    def prepare(self, N, K, q, s, dtype, nc):
        groups = s.shape[0]
        zeros = torch.full((groups, N), 8, dtype=torch.uint8, device=q.device)
        group_of_row = torch.arange(K, device=q.device) // (K // groups)
        generator = torch.Generator(device=q.device).manual_seed(7)
        if self.asymmetric:
            zeros = torch.randint(4, 12, (groups, N), dtype=torch.uint8, device=q.device, generator=generator)
        if self.act_order:
            group_of_row = group_of_row[torch.randperm(K, device=q.device, generator=generator)]
        if self.asymmetric or self.act_order:
            self.own_ref = lambda x: x.float() @ ((q.float() - zeros[group_of_row].float()) * s[group_of_row].float())
        tensors = {
            "qweight": _pack(q).cpu(),
            "scales": s.cpu(),
            "qzeros": _pack(zeros.t().contiguous()).t().contiguous().cpu(),
        }
        if self.act_order:
            tensors["g_idx"] = group_of_row.int().cpu()
        options = {"bits": 4, "group_size": K // groups, "checkpoint_format": "gptq_v2", "device": "cuda:0"}
        layers = [marlinq.load_gptq(**tensors, **options, kernel=self.kernel) for _ in range(nc)]
        if self.act_order:
            _grow_scratch_of_captures(layers[0], dtype)
        return layers


def _grow_scratch_of_captures(layer: marlinq.Linear, dtype: torch.dtype) -> None:
    """Runs the most rows once on the stream that torch captures on, where scratch cannot grow later."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
        layer(torch.zeros(MOST_ROWS, layer.in_features, dtype=dtype, device="cuda"))
    torch.cuda.synchronize()


PEERS = {
    "marlinq": lambda _: [Marlinq()],
    "marlinq-sm80": lambda _: [Marlinq("sm80")],
    "marlinq-sm80-asym": lambda _: [Marlinq("sm80", asymmetric=True)],
    "marlinq-sm80-act-order": lambda _: [Marlinq("sm80", act_order=True)],
}
