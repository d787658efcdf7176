"""One context per thread, device and stream, made when it is first needed."""

import sys
import threading
from typing import Any

from marlinq import _core


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[str, int], _core.Context] = {}


_contexts = _Contexts()


def _current_stream(device: str, like: Any) -> int:
    """The stream that is current for the library of `like`, else the default stream."""
    library = type(like).__module__.partition(".")[0]
    module = sys.modules.get(library)
    if library == "torch" and module is not None:
        return int(module.cuda.current_stream(device).cuda_stream)
    if library == "cupy" and module is not None:
        return int(module.cuda.get_current_stream().ptr)
    return 0


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
    stream = _current_stream(device, like) if device.startswith("cuda") else 0
    known = _contexts.known.get((device, stream))
    if known is None:
        known = _contexts.known[device, stream] = _core.Context(device, stream=stream)
    return known
