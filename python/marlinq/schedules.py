"""Measured schedules of layers on GPUs: which kernel runs how many rows."""

from pathlib import Path
from typing import Any

from marlinq import _core


class Schedules:
    """Schedules that `marlinq tune` has measured, for the loaders.

    One holds lines for any number of GPUs and layers; a layer takes those that are for its shape
    and format on the GPU that it is loaded onto. Rows that no line is for run as without it.
    """

    __slots__ = ("_handle",)

    def __init__(self, text: str = "") -> None:
        """Reads the lines; without any the library's own estimates decide everywhere.

        Args:
            text: A line for each: device | kernel | w4 g128 | NxK | first-last | schedule. Empty
                ones and those that begin with # say nothing.

        Raises:
            InvalidArgumentError: A line says something else; the message has its number.
        """
        self._handle = _core.Schedules(text)

    @classmethod
    def read(cls, path: str | Path) -> "Schedules":
        """Those of a file.

        Raises:
            OSError: It cannot be read.
            InvalidArgumentError: As of the constructor.
        """
        return cls(Path(path).read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        """The lines."""
        return self._handle.text

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._handle)

    def __repr__(self) -> str:
        """How many there are."""
        return f"<marlinq.Schedules, {len(self)} lines>"


def handle_of(schedules: Schedules | None) -> Any:
    """The core's object for a loader; None means those that come with the library."""
    return None if schedules is None else schedules._handle
