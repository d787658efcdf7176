"""Times the linear layers of a decoder layer one after the other, as a server runs them.

Each product reads the first columns of the output before it, in a CUDA graph that goes round
several decoder layers, so that weights come from memory. Prints for each number of rows the time
of a decoder layer, what its products take alone, and how long reading its weights would take at the
rate of a kernel that only reads, in the same run.

Needs torch for CUDA. Usage: decode_layer.py [fp16 | bf16] [rows ...]
"""

import statistics
import sys
from collections.abc import Callable

import marlinq
import torch

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # N, K of Llama-3-8B
GROUP_SIZE = 128
WEIGHT_BYTES = sum(n * k // 2 + n * k // GROUP_SIZE * 2 for n, k in SHAPES)
DECODER_LAYERS = 3
LEAST_BYTES = 170_000_000  # of the copies of one weight
CALLS = 120  # in a graph
REPLAYS = 9


def load(n: int, k: int, seed: int) -> marlinq.Linear:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, generator=generator)
    # Outputs are about as large as inputs.
    scales = (torch.rand(k // GROUP_SIZE, n, generator=generator) + 0.5) / (4.8 * k**0.5)
    return marlinq.load_gptq(
        qweight=words, scales=scales.half(), group_size=GROUP_SIZE, device="cuda:0"
    )


def time_us(run: Callable[[], object]) -> float:
    """Median over replays of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


def alone_us(i: int, decoder: list[list[marlinq.Linear]], m: int, dtype: torch.dtype) -> float:
    n, k = SHAPES[i]
    copies = [layers[i] for layers in decoder]
    while len(copies) * n * k // 2 < LEAST_BYTES:
        copies.append(load(n, k, 100 + len(copies)))
    x = torch.randn(m, k, device="cuda").to(dtype)
    out = torch.empty(m, n, dtype=dtype, device="cuda")

    def run() -> None:
        for call in range(CALLS):
            copies[call % len(copies)](x, out=out)

    return time_us(run) / CALLS


def together_us(decoder: list[list[marlinq.Linear]], m: int, dtype: torch.dtype) -> float:
    outputs = [torch.zeros(m, n, dtype=dtype, device="cuda") for n, _ in SHAPES]
    outputs[-1].normal_()
    rounds = CALLS // (DECODER_LAYERS * len(SHAPES))

    def run() -> None:
        x = outputs[-1]
        for _ in range(rounds):
            for layers in decoder:
                for linear, (_, k), out in zip(layers, SHAPES, outputs, strict=True):
                    linear(x[:, :k], out=out)
                    x = out

    return time_us(run) / (rounds * DECODER_LAYERS)


def main() -> None:
    dtype = torch.bfloat16 if "bf16" in sys.argv[1:] else torch.float16
    decoder = [
        [load(n, k, 4 * layer + i) for i, (n, k) in enumerate(SHAPES)]
        for layer in range(DECODER_LAYERS)
    ]
    data = torch.zeros(2**28, dtype=torch.float64, device="cuda")
    reading = WEIGHT_BYTES * time_us(data.sum) / data.nbytes
    del data
    print(f"{dtype}: reading the weights {reading:.1f} us")
    for m in [int(a) for a in sys.argv[1:] if a.isdigit()] or [1, 8, 16]:
        together = together_us(decoder, m, dtype)
        alone = [alone_us(i, decoder, m, dtype) for i in range(len(SHAPES))]
        parts = " + ".join(f"{us:.1f}" for us in alone)
        print(
            f"m = {m}: {together:.1f} us, {together / reading:.2f} times reading; "
            f"alone {parts} = {sum(alone):.1f} us"
        )


if __name__ == "__main__":
    main()
