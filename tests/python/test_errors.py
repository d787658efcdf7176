"""The exceptions: their bases, how they leave the core, and that nothing breaks after them."""

import pickle
import subprocess
import sys

import marlinq
import numpy as np
import pytest
from gptq_writer import make_layer
from marlinq import errors
from support import normal, run_python

BASES = {
    "InvalidArgumentError": ValueError,
    "InvalidFileError": ValueError,
    "UnsupportedError": NotImplementedError,
    "OutOfMemoryError": MemoryError,
    "DeviceError": None,
    "InternalError": None,
}


@pytest.mark.parametrize("name", BASES)
def test_bases(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.MarlinqError)
    assert issubclass(error, RuntimeError)
    base = BASES[name]
    assert base is None or issubclass(error, base)
    again = pickle.loads(pickle.dumps(error("what came")))
    assert type(again) is error
    assert str(again) == "what came"


def test_no_other_errors() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found == {*BASES, "MarlinqError", "MarlinqWarning"}
    assert issubclass(errors.MarlinqWarning, UserWarning)
    assert marlinq.MarlinqError is errors.MarlinqError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits: 5, expected 2, 3, 4 or 8"),
        ({"bits": 0}, "bits: 0, expected 2, 3, 4 or 8"),
        ({"bits": -4}, "bits: -4, expected 2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size: 0, expected -1 or at least 1"),
        ({"group_size": -128}, "group_size: -128, expected -1 or at least 1"),
        ({"group_size": 2**40}, "group_size: 1099511627776"),
        ({"k": -1}, "k: -1, expected 1 to"),
        ({"k": 2**40}, "k: 1099511627776, expected 1 to"),
        ({"checkpoint_format": "awq"}, "checkpoint_format: 'awq', expected one of auto, gptq, gpt"),
        ({"compute": "float64"}, "compute: 'float64', expected one of auto, float32"),
        ({"device": "gpu"}, "device: 'gpu', expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:x"}, "device: 'cuda:x', expected"),
        ({"device": ""}, "device: '', expected"),
        ({"kernel": "fast"}, "kernel"),
    ],
)
def test_options_of_the_loaders(change: dict[str, object], message: str) -> None:
    layer = make_layer(64, 256)
    with pytest.raises(errors.InvalidArgumentError) as raised:
        marlinq.load_gptq(**layer.arrays(), **change)
    assert message in str(raised.value)
    lists = {name: [array] for name, array in layer.arrays().items()}
    lists["qweights"] = lists.pop("qweight")
    with pytest.raises(errors.InvalidArgumentError) as raised:
        marlinq.load_gptq_stacked(**lists, **change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [{"bits": "4"}, {"bits": 4.5}, {"group_size": None}, {"compute": 3}, {"batch_invariant": "no"}],
)
def test_options_of_the_wrong_python_type(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, errors.InvalidArgumentError)):
        marlinq.load_gptq(**make_layer(64, 256).arrays(), **change)


def test_missing_tensors() -> None:
    arrays = make_layer(64, 256).arrays()
    for name in ("qweight", "scales"):
        with pytest.raises(errors.InvalidArgumentError, match=f"{name}: missing"):
            marlinq.load_gptq(**(arrays | {name: None}))


@pytest.mark.parametrize("elements", [2**60, 2**62, 2**63 - 1])
def test_memory_that_runs_out_is_an_error_and_no_crash(elements: int) -> None:
    context = marlinq.Context("cpu", 1)
    with pytest.raises(errors.OutOfMemoryError, match="cannot allocate"):
        context.pregrow_marlin_gather_scratch(elements)
    linear = marlinq.load_gptq(**make_layer(64, 256).arrays())
    x = normal((3, 256), 1)
    np.testing.assert_array_equal(linear(x, context=context), linear(x))


def test_messages_end_up_whole_in_a_traceback() -> None:
    script = (
        "import marlinq, numpy as np\n"
        "marlinq.load_gptq(np.zeros((3, 8), np.int32), np.ones((1, 8), np.float16), k=32)\n"
    )
    finished = subprocess.run(run_python("-c", script), capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    last = finished.stderr.strip().splitlines()[-1]
    assert last == (
        "marlinq.errors.InvalidArgumentError: qweight: shape [3, 8], expected "
        "[ceil(k * bits / 32), n] = [4, 8] (k = 32, bits = 4, group_size = 128)"
    )


def test_handles_are_opaque() -> None:
    """No public attribute of an object is an address."""
    linear = marlinq.load_gptq(**make_layer(64, 256).arrays())
    for name in dir(linear):
        if not name.startswith("_"):
            value = getattr(linear, name)
            assert callable(value) or isinstance(value, (int, str)), name
            assert not isinstance(value, int) or value < sys.maxsize >> 20, name
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(linear)


def test_a_missing_driver_is_named() -> None:
    cuda = [backend for backend in marlinq.info()["backends"] if backend["name"] == "cuda"]
    if not cuda or "no NVIDIA driver" not in cuda[0]["hardware"]:
        pytest.skip("no CUDA backend, or a driver")
    with pytest.raises(errors.DeviceError, match="'cuda:1': no NVIDIA driver is installed"):
        marlinq.Context("cuda:1")
