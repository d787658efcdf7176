"""marlinq runs the linear and mixture-of-experts layers of GPTQ checkpoints.

    import marlinq

    checkpoint = marlinq.open("path/to/checkpoint")
    q_proj = checkpoint.linear("model.layers.0.self_attn.q_proj")
    y = q_proj(x)

Arrays of numpy, torch and every library that speaks DLPack go in, and come out as the same kind.
"""

from pathlib import Path
from typing import Any

from marlinq import _core, errors
from marlinq._context import context_for
from marlinq._core import Context, __version__
from marlinq.checkpoint import Checkpoint, ModuleInfo, open
from marlinq.errors import MarlinqError, MarlinqWarning
from marlinq.linear import ExpertStack, Linear, load_gptq, load_gptq_stacked
from marlinq.moe import MoeBlock, moe_align_block_size, route
from marlinq.schedules import Schedules

__all__ = [
    "Checkpoint",
    "Context",
    "ExpertStack",
    "Linear",
    "MarlinqError",
    "MarlinqWarning",
    "ModuleInfo",
    "MoeBlock",
    "Schedules",
    "__version__",
    "errors",
    "get_cmake_dir",
    "info",
    "load_gptq",
    "load_gptq_stacked",
    "moe_align_block_size",
    "open",
    "route",
]


def info() -> dict[str, Any]:
    """What this build and this machine offer.

    Returns:
        "version"; "build", whether the CUDA backend was built, by what or why not; "threads", the
        host threads that a context uses unless told otherwise; "devices", the names that `device=`
        takes here; "backends", a list of dicts: "name", "devices", "hardware", "compute" and
        "kernels" with "name", "requires", "usable" and "chosen".
    """
    backends = _core.backends()
    return {
        "version": __version__,
        "build": _core.build_note(),
        "threads": context_for("cpu").threads,
        "devices": [device for backend in backends for device in backend["devices"]],
        "backends": backends,
    }


def get_cmake_dir() -> str:
    """Directory of an installed package's marlinqConfig.cmake, for CMAKE_PREFIX_PATH."""
    return str(Path(__file__).parent / "lib" / "cmake" / "marlinq")
