"""One context per thread and device, made when it is first needed."""

import threading

from marlinq import _core


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[str, _core.Context] = {}


_contexts = _Contexts()


def context_for(device: str, context: _core.Context | None = None) -> _core.Context:
    """The context to use: the caller's, else this thread's own for the device.

    Raises:
        DeviceError: The device does not exist.
        UnsupportedError: No backend of this build runs it.
    """
    if context is not None:
        return context
    known = _contexts.by_device.get(device)
    if known is None:
        known = _contexts.by_device[device] = _core.Context(device)
    return known
