"""marlinq among the rivals: a plug-in for a harness that times int4 products of others on CPUs.

The harness is a folder with a module `common` (weights, timing, ceilings, result rows) and one
script for each peer; run this one with that folder in PYTHONPATH and the same options as the rest.
Configurations are <g128|g32>-<sym|zp>-<compute type>, and perhaps -<instruction set> to force one.
"""

import common
import marlinq
import numpy as np

CONFIGS = (
    "g128-sym-int16,g128-sym-int8,g128-sym-float32,g128-sym-bfloat16,g128-zp-int16,g32-sym-int16"
)


def load(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, config: str) -> marlinq.Linear:
    """A layer of codes `[N, K]`, and scales and zero points `[N, G]`, as a checkpoint holds it."""
    group, kind, compute, *kernel = config.split("-")
    words = np.zeros((codes.shape[1] // 8, codes.shape[0]), np.uint32)
    for i in range(8):
        words |= codes.T[i::8].astype(np.uint32) << np.uint32(4 * i)
    qzeros = None
    if kind == "zp":
        packed = np.zeros((zeros.shape[1], zeros.shape[0] // 8), np.uint32)
        for i in range(8):
            packed |= zeros.T[:, i::8].astype(np.uint32) << np.uint32(4 * i)
        qzeros = packed.view(np.int32)
    return marlinq.load_gptq(
        words.view(np.int32),
        np.ascontiguousarray(scales.T).astype(np.float16),
        qzeros,
        group_size=int(group[1:]),
        checkpoint_format="gptq_v2",
        compute=compute,
        kernel=kernel[0] if kernel else None,
    )


def main() -> None:
    options = common.args()
    ceilings = common.Ceil(options.threads)
    out = common.Out(options.out, "marlinq", options.threads)
    context = marlinq.Context("cpu", options.threads)
    for n, k in options.shapes:
        for config in (options.configs or CONFIGS).split(","):
            group = int(config.split("-")[0][1:])
            codes, scales, zeros = common.make_weight(n, k, group, "sym" in config)
            layer = load(codes, scales, zeros, config)
            size = layer.describe()["packed_bytes"]
            count = common.copies(size)
            layers = [layer, *(load(codes, scales, zeros, config) for _ in range(count - 1))]
            dense = common.dequant(codes, scales, zeros, group)
            ceilings.measure()
            rows = []
            for temperature in ("cold", "hot"):
                for m in options.ms:
                    if temperature == "cold" and m > common.COLD_MAX_M:
                        continue
                    x = common.activations(m, k)
                    y = np.empty((m, n), np.float32)
                    calls = [
                        lambda layer=layer, x=x, y=y: layer(x, out=y, context=context)
                        for layer in (layers if temperature == "cold" else layers[:1])
                    ]
                    least, median, count, clean = common.bench(calls)
                    rows.append(
                        {
                            "config": config,
                            "N": n,
                            "K": k,
                            "M": m,
                            "temp": temperature,
                            "t_min": least,
                            "t_med": median,
                            "reps": count,
                            "clean": clean,
                            "wbytes": size,
                            "err": common.rel_err(y, x, dense),
                        }
                    )
            ceilings.measure()
            for row in rows:
                out.row(ceil=ceilings.last2(), **row)


if __name__ == "__main__":
    main()
