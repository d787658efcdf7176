"""One context per thread, device and stream, made when it is first needed."""

import sys
import threading
from typing import Any

from marlinq import _core

_outliving: list[_core.Context] = []
"""Contexts of ended threads whose memory a captured CUDA graph may still use."""


class _ThreadContexts(dict[tuple[str, int], _core.Context]):
    """The contexts of one thread, dropped when it ends unless a graph needs them."""

    def __del__(self, keep: list[_core.Context] = _outliving) -> None:
        keep.extend(context for context in self.values() if context.captured)


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.known = _ThreadContexts()


_contexts = _Contexts()


_libraries: dict[type, str] = {}


def _library_of(array: Any) -> str:
    """The array library of a type or its bases: "numpy", "torch", "cupy", or "" for any other."""
    kind = type(array)
    known = _libraries.get(kind)
    if known is None:
        roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
        known = next((root for root in roots if root in ("numpy", "torch", "cupy")), "")
        _libraries[kind] = known
    return known


def _current_stream(device: str, like: Any) -> int:
    """The stream that is current for the library of `like`, else the default stream."""
    library = _library_of(like)
    if library == "cupy":
        index = int(device.partition(":")[2])
        return int(sys.modules["cupy"].cuda.get_current_stream(index).ptr)
    # numpy has no stream. Where torch has one, it is the caller's, and inside a capture of it the
    # core can tell that it must not wait.
    torch = sys.modules.get("torch")
    if torch is None or not (like.is_cuda if library == "torch" else library == "numpy"):
        return 0
    if library == "numpy" and not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)


def context_for(
    device: str, context: _core.Context | None = None, like: Any = None
) -> _core.Context:
    """The context to use: the caller's, else this thread's own for the device and stream.

    Args:
        device: "cpu", "cuda", "cuda:1".
        context: Wins if given.
        like: An array on the device, whose library's current stream counts.

    Raises:
        DeviceError: The device does not exist.
        UnsupportedError: No backend of this build runs it.
    """
    if context is not None:
        return context
    if device == "cuda":
        device = "cuda:0"
    stream = _current_stream(device, like) if device.startswith("cuda") else 0
    known = _contexts.known.get((device, stream))
    if known is None:
        known = _contexts.known[device, stream] = _core.Context(device, stream=stream)
    return known


class Call:
    """One call on a device: the context that it uses, and how it ends.

    Attributes:
        context: The caller's, else this thread's own for the device and the stream that is current
            for the library of the first array, numpy's aside.
    """

    __slots__ = ("_device", "_own", "context")

    def __init__(self, device: str, context: _core.Context | None, *arrays: Any) -> None:
        """Chooses the context; arrays may be None, but the first. Raises as `context_for`."""
        like = arrays[0]
        if device != "cpu":
            for array in arrays:
                if array is not None and _library_of(array) != "numpy":
                    like = array
                    break
        self._own = context is None
        self._device = device
        self.context = context_for(device, context, like)

    def finish(self, *arrays: Any) -> None:
        """Waits where work on one of the arrays has to be done when a call returns.

        torch and CuPy go on after us on the current stream, and the core waits for numpy's copies.
        Other libraries learn nothing of our stream. A context of the caller's is theirs to order.
        """
        if not self._own or self._device == "cpu":
            return
        for array in arrays:
            if array is not None and not _library_of(array):
                self.context.synchronise()
                return

    def on_current_stream(self, array: Any) -> bool:
        """Whether the context's stream is the current one of the array's library."""
        return self._own or self.context.stream == _current_stream(self._device, array)
