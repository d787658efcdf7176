"""The exceptions of marlinq.

Every message names the tensor or argument, what came and what was needed. A path that does not
exist is a plain `FileNotFoundError`.
"""


class MarlinqError(RuntimeError):
    """Anything that marlinq raises by itself."""


class InvalidArgumentError(MarlinqError, ValueError):
    """A value that the caller passed."""


class InvalidFileError(MarlinqError, ValueError):
    """What a checkpoint holds: damaged files, or files that contradict each other."""


class UnsupportedError(MarlinqError, NotImplementedError):
    """Understood, but this build, backend or kernel does not do it."""


class OutOfMemoryError(MarlinqError, MemoryError):
    """Host or device memory ran out. Objects loaded before stay usable."""


class DeviceError(MarlinqError):
    """A device or its driver failed, or the device does not exist."""


class InternalError(MarlinqError):
    """A defect of marlinq."""


class MarlinqWarning(UserWarning):
    """Something about a checkpoint that a user should hear of; the load went on."""
