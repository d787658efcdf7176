"""Peak memory of opening and loading, measured in processes of their own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from gptq_writer import Tensor, encode_header, make_layer, write_checkpoint
from support import run_python

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/status, which is Linux's"
)

MEGABYTE = 1 << 20
# Python objects, the header, buffered reads and allocator slack; a second copy of anything measured
# here is four times this and more.
SLACK = 16 * MEGABYTE

_PREAMBLE = """
import sys
import marlinq

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

marlinq.Context("cpu", 1)
start = peak()
"""


def random_module(n: int, k: int, *, act_order: bool = False) -> dict[str, Tensor]:
    """The tensors of a symmetric module of any codes; packing codes would take far longer."""
    random = np.random.default_rng(n)
    groups = np.arange(k, dtype=np.int32) // 128
    return {
        "qweight": Tensor("I32", random.integers(0, 1 << 32, (k // 8, n), np.uint32).view("<i4")),
        "scales": Tensor("F16", np.ones((k // 128, n), np.float16)),
        "qzeros": Tensor("I32", np.full((k // 128, n // 8), 0x77777777, np.int32)),
        "g_idx": Tensor("I32", random.permutation(groups) if act_order else groups),
    }


def bytes_of(module: dict[str, Tensor]) -> int:
    return sum(tensor.array.nbytes for tensor in module.values())


def growth(script: str, *arguments: object) -> list[int]:
    """Runs a script that prints what peak() grew by since the import."""
    finished = subprocess.run(
        run_python("-c", _PREAMBLE + textwrap.dedent(script), *map(str, arguments)),
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in finished.stdout.split()]


def test_opening_a_large_file_costs_nothing(tmp_path: Path) -> None:
    """A sparse file of 2 GB with a small module at its end."""
    layer = make_layer(64, 256)
    size = 2 << 30
    header = {"embed.weight": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}
    tail = b""
    for name, (dtype, array) in layer.tensors().items():
        end = size + len(tail) + array.nbytes
        header[f"proj.{name}"] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [size + len(tail), end],
        }
        tail += array.tobytes()
    text = encode_header(header)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(text)
        stream.truncate(len(text) + size)
        stream.seek(len(text) + size)
        stream.write(tail)
    if file.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system has no sparse files")
    opened, loaded = growth(
        """
        checkpoint = marlinq.open(sys.argv[1])
        print(peak() - start)
        [info.as_dict() for info in checkpoint.modules()]
        checkpoint.linear("proj")
        print(peak() - start)
        """,
        tmp_path,
    )
    assert opened <= SLACK
    assert loaded <= SLACK


@pytest.mark.parametrize("act_order", [False, True])
def test_loading_costs_the_module_once_more(tmp_path: Path, act_order: bool) -> None:
    """The mapped pages that were read count too, so the peak is about twice the file."""
    module = random_module(8192, 16384, act_order=act_order)
    size = bytes_of(module)
    assert size > 4 * SLACK
    write_checkpoint(tmp_path, {"proj": module})
    opened, loaded, packed = growth(
        """
        checkpoint = marlinq.open(sys.argv[1])
        print(peak() - start)
        linear = checkpoint.linear("proj")
        print(peak() - start)
        print(linear.describe()["packed_bytes"])
        """,
        tmp_path,
    )
    assert opened <= SLACK
    assert loaded <= size + packed + SLACK


def test_a_stack_costs_its_experts_once_more(tmp_path: Path) -> None:
    module = random_module(2048, 4096)
    modules = {f"m.experts.{e}.down_proj": module for e in range(16)}
    size = 16 * bytes_of(module)
    assert size > 4 * SLACK
    write_checkpoint(tmp_path, modules)
    loaded, packed = growth(
        """
        stack = marlinq.open(sys.argv[1]).expert_stack("m.experts", "down_proj")
        print(peak() - start)
        print(stack.describe()["packed_bytes"])
        """,
        tmp_path,
    )
    assert loaded <= size + packed + SLACK


def test_forgotten_objects_give_their_memory_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"proj": random_module(2048, 4096)})
    first, last = growth(
        """
        checkpoint = marlinq.open(sys.argv[1])
        checkpoint.linear("proj")
        print(peak() - start)
        for _ in range(40):
            checkpoint.linear("proj")
        print(peak() - start)
        """,
        tmp_path,
    )
    assert last <= first + SLACK
