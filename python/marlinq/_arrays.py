"""Arrays of whatever library the caller uses: their device, and new ones of the same kind.

No array library but numpy is imported here. The core reads and writes the arrays themselves;
nothing in this file copies data, except `to_float32`, which says so.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from marlinq import _core
from marlinq._context import Call
from marlinq.errors import InvalidArgumentError, UnsupportedError

Array: TypeAlias = Any
"""A numpy array, a torch tensor, or an array of another library that speaks DLPack."""

_DLPACK_CPU = 1
_DLPACK_CUDA = 2
_DLPACK_CUDA_HOST = 3
_JAX = ("jax", "jaxlib")


def _torch() -> ModuleType | None:
    """The torch module if the caller imported it: without it nothing can be a torch tensor."""
    return sys.modules.get("torch")


def _is_torch(array: Array) -> bool:
    torch = _torch()
    return torch is not None and isinstance(array, torch.Tensor)


def _namespace(array: Array) -> Any:
    """The array library of `array`: what it names itself, or the root module of its type."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(type(array).__module__.partition(".")[0])


def shape_of(array: Array, name: str) -> tuple[int, ...]:
    """The shape of an input.

    Raises:
        InvalidArgumentError: `array` is no array, or records gradients.
    """
    if isinstance(array, np.ndarray):
        return tuple(array.shape)
    if not hasattr(array, "__dlpack__") or not hasattr(array, "shape"):
        raise InvalidArgumentError(
            f"{name}: {type(array).__name__}, expected a numpy array, a torch tensor or another "
            "array that speaks DLPack"
        )
    if getattr(array, "requires_grad", False):
        raise InvalidArgumentError(
            f"{name}: requires grad, but marlinq computes no gradients; pass {name}.detach()"
        )
    return tuple(int(extent) for extent in array.shape)


def device_of(array: Array) -> str:
    """The device of an array as marlinq names it: "cpu", "cuda:1".

    Raises:
        UnsupportedError: The array lies on a device that marlinq has no name for.
    """
    if isinstance(array, np.ndarray):
        return "cpu"
    kind, index = array.__dlpack_device__()
    if kind in (_DLPACK_CPU, _DLPACK_CUDA_HOST):
        return "cpu"
    if kind == _DLPACK_CUDA:
        return f"cuda:{index}"
    raise UnsupportedError(f"array on DLPack device type {int(kind)}, expected the CPU or CUDA")


class Output:
    """A new array of the same kind as another: `target` for the core, `array()` for the caller.

    Both are one array for numpy, torch and CuPy. Arrays of other libraries may be immutable, so the
    core writes a buffer of its own, which the library then takes over without a copy.
    """

    __slots__ = ("_namespace", "target")

    def __init__(self, target: Any, namespace: Any = None) -> None:
        self.target = target
        self._namespace = namespace

    def array(self) -> Array:
        """The finished array. Call it once, after the core wrote `target`."""
        return self.target if self._namespace is None else self._namespace.from_dlpack(self.target)


def allocate(
    like: Array, shape: Sequence[int], context: _core.Context, dtype: str | None = None
) -> Output:
    """Allocates an uninitialised array in the library and on the device of `like`.

    Args:
        like: An array that `shape_of` accepted.
        shape: Of the new array.
        context: Writes the array: its device counts where the library leaves the memory to marlinq.
        dtype: "float32" or "int32"; None takes the dtype of `like`.

    Raises:
        InvalidArgumentError: The shape is negative, or the library of `like` cannot take an array
            over from marlinq.
    """
    if min(shape, default=0) < 0:
        raise InvalidArgumentError(f"out: shape {list(shape)}, expected no negative extent")
    if isinstance(like, np.ndarray):
        return Output(np.empty(shape, like.dtype if dtype is None else dtype))
    torch = _torch()
    if torch is not None and isinstance(like, torch.Tensor):
        kind = like.dtype if dtype is None else getattr(torch, dtype)
        return Output(torch.empty(tuple(shape), dtype=kind, device=like.device))
    namespace = _namespace(like)
    if type(like).__module__.partition(".")[0] == "cupy":
        with like.device:
            return Output(
                namespace.empty(tuple(shape), dtype=like.dtype if dtype is None else dtype)
            )
    if not hasattr(namespace, "from_dlpack"):
        raise InvalidArgumentError(
            f"{type(like).__name__}: its library has no from_dlpack, so pass out="
        )
    kind = str(like.dtype) if dtype is None else dtype
    if device_of(like) == "cpu":
        return Output(_core.HostBuffer(shape, kind), namespace)
    return Output(_core.DeviceBuffer(context, shape, kind), namespace)


def clear(output: Output, call: Call) -> None:
    """Fills a new array with zeros, on the stream of the call's context."""
    target = output.target
    if isinstance(target, _core.HostBuffer | _core.DeviceBuffer):  # zeros already
        return
    if isinstance(target, np.ndarray) or call.on_current_stream(target):
        target[...] = 0
    else:
        kind = str(target.dtype).removeprefix("torch.")
        call.context.copy(_core.DeviceBuffer(call.context, target.shape, kind), target)


def integer(value: int, like: Array, call: Call) -> Array:
    """An int32 array `[1]`, of torch where `like` lies, which waits for nothing; else of numpy."""
    torch = _torch()
    if torch is not None and isinstance(like, torch.Tensor) and call.on_current_stream(like):
        return torch.full((1,), value, dtype=torch.int32, device=like.device)
    return np.array([value], np.int32)


def given(out: Array) -> Output:
    """The caller's own array.

    Raises:
        InvalidArgumentError: `out` is an array of JAX, which are values that never change.
    """
    if not isinstance(out, np.ndarray) and type(out).__module__.partition(".")[0] in _JAX:
        raise InvalidArgumentError(
            "out: arrays of JAX are immutable, expected None; take the result instead"
        )
    return Output(out)


def same_kind(like: Array, array: np.ndarray[Any, Any]) -> Array:
    """Hands a numpy array over to the library of `like`, in host memory and without a copy."""
    if isinstance(like, np.ndarray):
        return array
    torch = _torch()
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(array)
    namespace = _namespace(like)
    return namespace.from_dlpack(array) if hasattr(namespace, "from_dlpack") else array


def to_float32(array: Array) -> Array:
    """A copy as float32 in host memory; an array of neither numpy nor torch stays as it is."""
    if _is_torch(array):
        return array.detach().float().cpu().contiguous()
    return np.ascontiguousarray(array, np.float32) if isinstance(array, np.ndarray) else array
