"""Draws what the rivals' harness measured: a plot per shape, time against rows, as SVG.

Needs matplotlib. Usage: plot_products.py rows.json READ_TB_S DIRECTORY. The floor is
max(1.7 us + bytes / READ_TB_S, operations / 780 TFLOP/s); rows are rounded up to 8.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

GROUP_SIZE = 128
LAUNCH_US = 1.7
TFLOPS = 780.0


def floor_us(n: int, k: int, m: int, read_tb_s: float) -> float:
    rows = -(-m // 8) * 8
    weight = n * k / 2 + 2 * n * k / GROUP_SIZE
    activations = 2 * m * (n + k)
    return max(
        LAUNCH_US + (weight + activations) / (read_tb_s * 1e6), 2 * n * k * rows / (TFLOPS * 1e6)
    )


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())
    read_tb_s, directory = float(sys.argv[2]), Path(sys.argv[3])
    directory.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "marlinq", "svg.fonttype": "none", "font.size": 9})
    times: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        # Of several kernels of one library, the fastest.
        line = times[row["shape"], row["dtype"]][row["peer"].split("/")[0]]
        line[row["M"]] = min(row["us"], line.get(row["M"], float("inf")))
    for (shape, dtype), lines in times.items():
        n, k = map(int, shape.split("x"))
        figure, axes = plt.subplots(figsize=(5.6, 3.6))
        every = sorted({m for line in lines.values() for m in line})
        axes.plot(every, [floor_us(n, k, m, read_tb_s) for m in every], "k:", label="floor")
        for name, line in sorted(lines.items(), key=lambda item: item[0] != "marlinq"):
            ours = name == "marlinq"
            ms = sorted(line)
            axes.plot(
                ms,
                [line[m] for m in ms],
                marker="o",
                markersize=3,
                linewidth=2 if ours else 1,
                color="C3" if ours else None,
                label=name,
            )
        axes.set(xscale="log", yscale="log", xlabel="rows (m)", ylabel="us")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{n} x {k}, {dtype}, 4 bits, group {GROUP_SIZE}")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(directory / f"{shape}_{dtype}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
