"""What the tests of the CUDA backend share: layers made on the device, with float64 beside them.

Importing it skips the importing file, visibly, where there is no torch. Nothing here loops over
elements: references of large layers are products of float64 on the GPU.
"""

import os
import subprocess
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import TINY_SCALE, Layer
from marlinq.errors import InvalidArgumentError
from support import run_python, tolerance

torch = pytest.importorskip("torch")

DEVICES: list[str] = [
    device
    for backend in marlinq.info()["backends"]
    if backend["name"] == "cuda"
    for device in backend["devices"]
]
needs_device = pytest.mark.skipif(not DEVICES, reason="no CUDA device")
needs_two_devices = pytest.mark.skipif(len(DEVICES) < 2, reason="fewer than two CUDA devices")

# The usable architectures, the one that is taken first.
KERNELS: list[str] = [
    kernel["name"]
    for backend in marlinq.info()["backends"]
    if backend["name"] == "cuda"
    for kernel in backend["kernels"]
    if kernel["usable"]
]
each_kernel = pytest.mark.parametrize("arch", KERNELS)

DEVICE = "cuda:0"
TYPES = ["float16", "bfloat16"]
BOUNDS = {name: tolerance("cuda", name) for name in TYPES}
BLOCK_BOUNDS = {name: tolerance("cuda_moe", name) for name in TYPES}
_FEW = 256
_FEW_FACTOR = tolerance("small_output", "factor")
_LONG_ROW = 32  # elements: the norm of so many does not come out near 0
_SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

Tensor = Any


def normal(m: int, k: int, dtype: str, device: str = DEVICE, seed: int = 0) -> Tensor:
    """Standard normal rows on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn((m, k), generator=generator, device=device)
    return x.to(getattr(torch, dtype))


def pack_fields(fields: Tensor, bits: int) -> Tensor:
    """Packs `[..., count, columns]` of 2, 4 or 8 bits along the second last axis, the first lowest,
    into int32 words.
    """
    per_word = 32 // bits
    *lead, count, columns = fields.shape
    words = -(-count // per_word)
    padded = torch.zeros(
        (*lead, words * per_word, columns), dtype=torch.int32, device=fields.device
    )
    padded[..., :count, :] = fields
    shifts = torch.arange(per_word, dtype=torch.int32, device=fields.device) * bits
    spread = padded.view(*lead, words, per_word, columns) << shifts[:, None]
    return spread.sum(-2, dtype=torch.int32)


class DeviceLayer:
    """A random layer of 2, 4 or 8 bits, quantised and packed on the device.

    Packing is written from the format, with shifts and sums of whole arrays. Zero points are 1 and
    more, which every writer stores alike.
    """

    def __init__(
        self,
        n: int,
        k: int,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = False,
        act_order: bool = False,
        bias: bool = False,
        scale_dtype: str = "F16",
        seed: int = 0,
        device: str = DEVICE,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        rows = k if group_size == -1 else group_size
        count = -(-k // rows)
        self.n, self.k, self.bits, self.group_size = n, k, bits, group_size
        self.codes = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8, **options)
        self.zeros = torch.full((count, n), 1 << (bits - 1), dtype=torch.uint8, device=device)
        if not symmetric:
            self.zeros = torch.randint(1, 1 << bits, (count, n), dtype=torch.uint8, **options)
        kind = getattr(torch, _SCALE_DTYPES[scale_dtype])
        self.scales = ((torch.rand((count, n), **options) + 0.5) / (1 << bits)).to(kind)
        if scale_dtype == "BF16" and n >= 16:
            self.scales[0, n // 2] = TINY_SCALE
        self.groups = torch.arange(k, device=device) // rows
        if act_order:
            self.groups = self.groups[torch.randperm(k, **options)]
        self.bias = torch.randn(n, **options).half() if bias else None

    def arrays(self) -> dict[str, Tensor]:
        """The keyword arguments of `marlinq.load_gptq`, in host memory."""
        tensors = {
            "qweight": pack_fields(self.codes, self.bits),
            "scales": self.scales,
            "qzeros": pack_fields((self.zeros - 1).T, self.bits).T.contiguous(),
            "g_idx": self.groups.int(),
            "bias": self.bias,
        }
        return {name: t.cpu() for name, t in tensors.items() if t is not None}

    def load(self, device: str = DEVICE, **options: Any) -> marlinq.Linear:
        return marlinq.load_gptq(
            **self.arrays(),
            device=device,
            bits=self.bits,
            group_size=self.group_size,
            k=self.k,
            checkpoint_format="gptq",
            **options,
        )

    def dense(self) -> Tensor:
        """The matrix `[N, K]` in float64."""
        centred = self.codes.double() - self.zeros[self.groups].double()
        return (centred * self.scales[self.groups].double()).T


class DeviceStack:
    """Random experts of one shape, quantised and packed on the device, otherwise as `DeviceLayer`.

    With act-order every second expert has an order of its own; the others are plain, half of them
    without a g_idx.
    """

    def __init__(
        self,
        experts: int,
        n: int,
        k: int,
        *,
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = False,
        act_order: bool = False,
        bias: bool = False,
        scale_dtype: str = "F16",
        layout: str = "gptq",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        options = {"generator": generator, "device": DEVICE}
        rows = k if group_size == -1 else group_size
        count = -(-k // rows)
        self.experts, self.n, self.k = experts, n, k
        self.bits, self.group_size, self.layout = bits, group_size, layout
        self.codes = torch.randint(0, 1 << bits, (experts, k, n), dtype=torch.uint8, **options)
        shape = (experts, count, n)
        if symmetric:
            self.zeros = torch.full(shape, 1 << (bits - 1), dtype=torch.uint8, device=DEVICE)
        else:
            self.zeros = torch.randint(1, 1 << bits, shape, dtype=torch.uint8, **options)
        kind = getattr(torch, _SCALE_DTYPES[scale_dtype])
        self.scales = ((torch.rand(shape, **options) + 0.5) / (1 << bits)).to(kind)
        if scale_dtype == "BF16" and n >= 16:
            self.scales[:, 0, n // 2] = TINY_SCALE
        self.groups = (torch.arange(k, device=DEVICE) // rows).repeat(experts, 1)
        if act_order:
            order = torch.rand((experts, k), **options).argsort(1)
            self.groups[1::2] = self.groups.gather(1, order)[1::2]
        self.bias = torch.randn((experts, n), **options).half() if bias else None

    def arrays(self) -> dict[str, list[Tensor | None]]:
        """The keyword arguments of `marlinq.load_gptq_stacked`, in host memory."""
        stored = self.zeros - 1 if self.layout == "gptq" else self.zeros
        qzeros = pack_fields(stored.transpose(1, 2), self.bits).transpose(1, 2).contiguous()
        tensors = {
            "qweights": pack_fields(self.codes, self.bits),
            "scales": self.scales,
            "qzeros": qzeros,
            "g_idx": self.groups.int(),
            "bias": self.bias,
        }
        lists = {name: list(t.cpu()) for name, t in tensors.items() if t is not None}
        lists["g_idx"] = [None if e % 4 == 0 else one for e, one in enumerate(lists["g_idx"])]
        return lists

    def load(
        self, device: str = DEVICE, arrays: dict[str, Any] | None = None, **options: Any
    ) -> marlinq.ExpertStack:
        """The stack on a device; `arrays` is what `arrays()` returned, where that was called."""
        return marlinq.load_gptq_stacked(
            **(self.arrays() if arrays is None else arrays),
            device=device,
            bits=self.bits,
            group_size=self.group_size,
            k=self.k,
            checkpoint_format=self.layout,
            **options,
        )

    def dense(self) -> Tensor:
        """The matrices `[E, N, K]` in float64."""
        rows = self.groups[:, :, None].expand(-1, -1, self.n)
        centred = self.codes.double() - self.zeros.double().gather(1, rows)
        return (centred * self.scales.double().gather(1, rows)).transpose(1, 2)


class Experts:
    """Matrices `[E, N, K]` in float64 on the device, and products of rows with one of them each."""

    def __init__(self, dense: Tensor, bias: Tensor | None = None) -> None:
        self.dense = dense
        self.bias = None if bias is None else bias.double()

    def products(self, x: Tensor, experts: Tensor) -> Tensor:
        """Row i of x through expert experts[i], float64; zeros for -1."""
        wide, experts = x.double(), experts.long()
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts + 1, minlength=len(self.dense) + 1).tolist()
        y = torch.zeros((len(x), self.dense.shape[1]), dtype=torch.float64, device=x.device)
        first = counts[0]
        for expert, count in enumerate(counts[1:]):
            if count:
                rows = order[first : first + count]
                product = wide[rows] @ self.dense[expert].T
                y[rows] = product if self.bias is None else product + self.bias[expert]
                first += count
        return y

    def energy(self, x: Tensor, experts: Tensor) -> Tensor:
        """The sum of x² w² and bias² over all of these products; for few rows of few features."""
        rows, owners = x[experts >= 0].double(), experts[experts >= 0].long()
        energy = torch.einsum("rk,rnk->", rows**2, self.dense[owners] ** 2)
        return energy if self.bias is None else energy + (self.bias[owners] ** 2).sum()


def check_rows(y: Tensor, expected: Tensor, bound: float, what: object, energy: Any = None) -> None:
    """Compares rows with float64: all of them together, and each that is long enough on its own.

    Fewer than 256 elements are measured against `energy`, or against themselves, with three times
    the bound; a single row gets that too.
    """
    assert y.shape == expected.shape, what
    if y.numel() == 0:
        return
    difference = y.double() - expected
    few = y.numel() < _FEW
    scale = torch.linalg.norm(expected)
    if few and energy is not None:
        scale = torch.sqrt(energy)
    allowed = (_FEW_FACTOR if few else 1) * bound * scale
    error = torch.linalg.norm(difference)
    assert bool(error <= allowed), f"{what}: {float(error / allowed):.3f} times the bound"
    if y.shape[1] >= _LONG_ROW:
        errors = torch.linalg.norm(difference, dim=1)
        allowed = _FEW_FACTOR * bound * torch.linalg.norm(expected, dim=1)
        wrong = torch.nonzero(~(errors <= allowed)).flatten().tolist()
        assert not wrong, f"{what}: rows {wrong[:8]}"


class Reference:
    """Products of a float64 matrix, for any number of the first rows of x."""

    def __init__(self, dense: Tensor, bias: Tensor | None, x: Tensor) -> None:
        wide = x.double()
        self.y = wide @ dense.T
        if bias is not None:
            self.y += bias.double()
        if len(dense) < _FEW:  # of few elements: what was summed, which cancels less than they do
            self._energy = torch.cumsum(((wide[:_FEW] ** 2) @ (dense**2).T).sum(1), 0)
        self._bound = BOUNDS[str(x.dtype).removeprefix("torch.")]

    def error(self, y: Tensor) -> float:
        """Of the first rows, over the bound: at most 1 passes. NaN is no number below 1."""
        expected = self.y[: len(y)]
        difference = torch.linalg.norm(y.double() - expected)
        if y.numel() >= _FEW:
            return float(difference / (self._bound * torch.linalg.norm(expected)))
        scale = torch.sqrt(self._energy[len(y) - 1])
        return float(difference / (_FEW_FACTOR * self._bound * scale))

    def check(self, y: Tensor, what: object = "") -> None:
        error = self.error(y)
        assert error <= 1, f"{what}, m {len(y)}, {y.dtype}: {error:.3f} times the bound"


def reference(layer: DeviceLayer | Layer, x: Tensor) -> Reference:
    """The products of a layer, on the device of x."""
    if isinstance(layer, DeviceLayer):
        dense, bias = layer.dense().to(x.device), layer.bias
    else:
        dense = torch.from_numpy(layer.dense()).to(x.device)
        bias = None if layer.bias is None else torch.from_numpy(layer.bias).to(x.device)
    return Reference(dense, bias, x)


def load(layer: Layer, device: str = DEVICE, **options: Any) -> marlinq.Linear:
    """A layer of gptq_writer on the device."""
    shape = {"bits": layer.bits, "group_size": layer.group_size, "k": layer.k}
    return marlinq.load_gptq(**layer.arrays(), device=device, **shape, **options)


def guarded(m: int, n: int, dtype: Any, offset: int = 8, device: str = DEVICE) -> tuple[Any, Any]:
    """An output inside a larger matrix of sevens: (the matrix, the output)."""
    store = torch.full((m + 2, n + offset + 8), 7.0, dtype=dtype, device=device)
    return store, store[1 : m + 1, offset : offset + n]


def untouched(store: Tensor, out: Tensor) -> bool:
    """Whether only the output was written. Overwrites the output."""
    out.fill_(7)
    return bool((store == 7).all())


def host(tensor: Tensor) -> np.ndarray[Any, Any]:
    """float32 numbers of a tensor of any type."""
    return tensor.float().cpu().numpy()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0), work(1), ... at once; the first exception of any is raised."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check_refused_in_capture(
    call: Callable[[], Any], refused: Callable[[], Any], out: Tensor, stream: Any = None
) -> None:
    """Arrays of the host: refused before anything is captured, and the capture goes on.

    `call` writes `out`.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()
        wanted = out.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            with pytest.raises(InvalidArgumentError, match=r"graph capture: .*on the device"):
                refused()
            call()
        out.zero_()
        graph.replay()
    stream.synchronize()
    assert torch.equal(out, wanted)


_NO_JAX, _NO_GPU = 77, 78
_JAX = f"""
import sys
try:
    import jax
    import jax.numpy as jnp
except ImportError:
    sys.exit({_NO_JAX})
if not any(device.platform == "gpu" for device in jax.devices()):
    sys.exit({_NO_GPU})
import marlinq
import numpy as np
"""


def run_with_jax(script: str) -> None:
    """Runs a script that finds jax, jnp, marlinq and np; skips where JAX has no GPU.

    In a process of its own: JAX takes most of a device's memory unless told otherwise.
    """
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    finished = subprocess.run(
        run_python("-c", _JAX + textwrap.dedent(script)),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if finished.returncode == _NO_JAX:
        pytest.skip("jax is not installed")
    if finished.returncode == _NO_GPU:
        pytest.skip("jax sees no GPU")
    assert finished.returncode == 0, finished.stdout + finished.stderr
