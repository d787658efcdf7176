"""What is installed: the C++ side for find_package, types, and nothing that the import need not."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import marlinq
import numpy as np
import pytest
from support import TESTS, run_python

CMAKE_DIR = Path(marlinq.get_cmake_dir())
EXAMPLE = TESTS.parent / "cpp" / "examples" / "embed_cpu"

# The tools of the test requirements lie beside the interpreter, whether or not its environment is
# activated.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
CMAKE, NINJA = (shutil.which(name, path=_PATH) for name in ("cmake", "ninja"))

needs_install = pytest.mark.skipif(
    not CMAKE_DIR.is_dir(),
    reason=f"marlinq is imported from a source tree: {CMAKE_DIR} is not there without an install",
)


def test_versions_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([.+\w]*)?", marlinq.__version__)
    try:
        installed = importlib.metadata.version("marlinq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("marlinq is imported from a source tree")
    assert installed == marlinq.__version__


def test_public_names() -> None:
    for name in marlinq.__all__:
        assert hasattr(marlinq, name), name
        value = getattr(marlinq, name)
        assert name == "__version__" or isinstance(value, ModuleType) or value.__doc__, name


def test_types_are_part_of_the_package() -> None:
    package = Path(marlinq.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()


def test_stubs_name_what_the_module_has() -> None:
    """Every public name of the compiled module is in its stub, and no other."""
    import ast

    from marlinq import _core

    tree = ast.parse((Path(marlinq.__file__).parent / "_core.pyi").read_text())
    stubs = {
        node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    public = {name for name in vars(_core) if not name.startswith("_")}
    assert {name for name in stubs if not name.startswith("_")} == public
    for name, node in stubs.items():
        if isinstance(node, ast.ClassDef):
            members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            real = {member for member in vars(getattr(_core, name)) if not member.startswith("_")}
            assert {member for member in members if not member.startswith("_")} == real, name


def test_import_is_light() -> None:
    """No array library but numpy, and no terminal library, comes with the import."""
    script = "import marlinq, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    finished = subprocess.run(run_python("-c", script), capture_output=True, text=True, check=True)
    loaded = set(finished.stdout.split())
    assert {"marlinq", "numpy", "safetensors"} <= loaded
    assert not loaded & {"torch", "cupy", "jax", "ml_dtypes", "rich", "transformers"}


def test_bfloat16_scales_need_no_extra_package(tmp_path: Path) -> None:
    """Runs where neither ml_dtypes nor torch can be imported."""
    from gptq_writer import make_layer, write_checkpoint

    layer = make_layer(64, 128, scale_dtype="BF16", bias=True, bias_dtype="BF16")
    write_checkpoint(tmp_path, {"proj": layer})
    script = (
        "import sys\n"
        "sys.modules['ml_dtypes'] = sys.modules['torch'] = None\n"
        "import marlinq, numpy\n"
        "linear = marlinq.open(sys.argv[1]).linear('proj')\n"
        "assert linear.describe()['scale_dtype'] == 'bfloat16'\n"
        "numpy.save(sys.argv[2], linear(numpy.eye(128, dtype=numpy.float32)))\n"
    )
    out = tmp_path / "y.npy"
    subprocess.run(run_python("-c", script, str(tmp_path), str(out)), check=True)
    exact = (layer.dense().T + layer.bias).astype(np.float32)
    # A product and a sum, each rounded to float32.
    np.testing.assert_allclose(np.load(out), exact, rtol=2e-7, atol=1e-7)


def test_environment_variables_change_nothing() -> None:
    script = "import marlinq, json; print(json.dumps(marlinq.info()))"
    plain = subprocess.run(run_python("-c", script), capture_output=True, text=True, check=True)
    noisy = os.environ | {
        f"MARLINQ_{name}": "1" for name in ("KERNEL", "ISA", "THREADS", "DEVICE", "DEBUG", "LOG")
    }
    other = subprocess.run(
        run_python("-c", script), capture_output=True, text=True, check=True, env=noisy
    )
    assert plain.stdout == other.stdout


def test_license_and_metadata() -> None:
    try:
        metadata = importlib.metadata.metadata("marlinq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("marlinq is imported from a source tree")
    assert metadata["License-Expression"] == "Apache-2.0"
    required = {
        re.split(r"[\s<>=!~;\[]", requirement)[0]
        for requirement in metadata.get_all("Requires-Dist") or []
        if "extra ==" not in requirement
    }
    assert required == {"numpy", "safetensors", "rich"}


@needs_install
def test_cmake_files_are_installed() -> None:
    assert (CMAKE_DIR / "marlinqConfig.cmake").is_file()
    assert (CMAKE_DIR / "marlinqConfigVersion.cmake").is_file()


@needs_install
def test_the_library_needs_no_cuda_library() -> None:
    """A CUDA runtime, if any, is linked in, so that the package imports without a driver."""
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("there is no ldd")
    package = Path(marlinq.__file__).parent
    for library in [*package.glob("_core*.so"), *package.glob("lib/libmarlinq.so*")]:
        finished = subprocess.run([ldd, str(library)], capture_output=True, text=True, check=True)
        assert "not found" not in finished.stdout
        assert not re.search(r"lib(cuda|nv|cublas)", finished.stdout), finished.stdout


def test_a_build_with_cuda_lists_it_without_a_device() -> None:
    """In a process that sees no device, whatever the machine has."""
    script = "import marlinq, json; print(json.dumps(marlinq.info()))"
    finished = subprocess.run(
        run_python("-c", script),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    found = json.loads(finished.stdout)
    cuda = [backend for backend in found["backends"] if backend["name"] == "cuda"]
    assert bool(cuda) == found["build"].startswith("with the CUDA backend: ")
    if not cuda:
        pytest.skip(f"marlinq was built {found['build']}")
    assert cuda[0]["devices"] == []
    assert cuda[0]["hardware"].startswith("none")
    usable = {kernel["name"]: kernel["usable"] for kernel in cuda[0]["kernels"]}
    assert "sm80" in usable
    assert not any(usable.values())
    script = (
        "import marlinq\n"
        "try:\n"
        "    marlinq.Context('cuda')\n"
        "except marlinq.errors.DeviceError as error:\n"
        "    print(error)\n"
    )
    finished = subprocess.run(
        run_python("-c", script),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.stdout.startswith("device 'cuda:0': ")


@needs_install
@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_the_example_builds_against_the_wheel(tmp_path: Path) -> None:
    build = tmp_path / "build"
    configure = ["-S", str(EXAMPLE), "-B", str(build), f"-Dmarlinq_DIR={CMAKE_DIR}"]
    if NINJA is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    for arguments in (
        [*configure, "-DCMAKE_BUILD_TYPE=Release"],
        ["--build", str(build), "--parallel", "2"],
    ):
        finished = subprocess.run(
            [str(CMAKE), *arguments], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    finished = subprocess.run(
        [str(build / "embed_cpu")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Weights 1 to 7 and 0 on a row of ones, plus 8; and twice that.
    assert "y = 36 72" in finished.stdout
