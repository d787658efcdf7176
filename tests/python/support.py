"""What several test files need: bounds, kernels, data, and the comparison of results."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import Array, Expected

TESTS = Path(__file__).parent.parent
DATA = TESTS / "data"
_TOLERANCES = json.loads((TESTS / "tolerances.json").read_text())


def tolerance(table: str, name: str) -> float:
    """A bound of tests/tolerances.json, which gives its reason."""
    return float(_TOLERANCES[table][name]["bound"])


def _auto_compute() -> str:
    """The compute type that this machine's CPU layers have unless a test asks for another."""
    words, scales = np.zeros((4, 32), np.int32), np.ones((1, 32), np.float16)
    return str(marlinq.load_gptq(words, scales, group_size=32).describe()["compute"])


EXACT_BOUND = tolerance("linear", "float32")
LINEAR_BOUND = tolerance("linear", _auto_compute())
MOE_BOUND = tolerance("moe", _auto_compute())

_FEW_ELEMENTS = 256
_FEW_ELEMENTS_FACTOR = tolerance("small_output", "factor")


def usable_kernels() -> list[str]:
    """The CPU kernels that this machine runs."""
    return [kernel["name"] for kernel in _cpu_kernels() if kernel["usable"]]


def _cpu_kernels() -> list[dict[str, Any]]:
    backends = marlinq.info()["backends"]
    return next(backend["kernels"] for backend in backends if backend["name"] == "cpu")


def kernel_parameters() -> list[Any]:
    """All CPU kernels as test parameters; those that this machine cannot run are skipped."""
    return [
        pytest.param(
            kernel["name"],
            marks=()
            if kernel["usable"]
            else pytest.mark.skip(reason=f"this machine lacks {kernel['requires']}"),
        )
        for kernel in _cpu_kernels()
    ]


def error_and_factor(result: Array, expected: Expected) -> tuple[float, float]:
    """The relative error, and the factor that its bound gets.

    The Frobenius norm of the difference over that of the expected values; under 256 elements, where
    that ratio scatters, over sqrt(sum of x² w²), and the bound counts several times.
    """
    assert result.shape == expected.y.shape
    difference = np.linalg.norm(np.asarray(result, np.float64) - expected.y)
    few = result.size < _FEW_ELEMENTS
    scale = np.sqrt(expected.magnitude.sum()) if few else np.linalg.norm(expected.y)
    error = float(difference / scale if scale > 0 else difference)
    return error, _FEW_ELEMENTS_FACTOR if few else 1.0


def assert_close(result: Any, expected: Expected, bound: float, what: object) -> None:
    """Fails where the relative error exceeds the bound; `what` names shape and seed."""
    error, factor = error_and_factor(np.asarray(result), expected)
    assert error <= bound * factor, f"{what}: error {error:.2e}, bound {bound * factor:.1e}"


def normal(shape: int | tuple[int, ...], seed: int, dtype: Any = np.float32) -> Array:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run_python(*arguments: str) -> list[str]:
    """The command line of this interpreter."""
    return [sys.executable, *arguments]


def copy_data(name: str, directory: Path) -> Path:
    """A writable copy of a checkpoint of tests/data."""
    return Path(shutil.copytree(DATA / name, directory / name))
