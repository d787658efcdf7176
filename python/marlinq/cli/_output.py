"""Tables, progress and JSON of the command line; the only file that needs a terminal library."""

import json
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 240  # nobody wraps a pipe: wide enough that no cell is cut
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to `main` to end quietly."""
        raise BrokenPipeError


def _console() -> Console:
    return _Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[str] = ()
) -> None:
    """Prints a table. Cells are text; columns named in `numeric` are aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        if column in numeric:
            table.add_column(column, justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _console().print(table)


def print_line(text: str) -> None:
    """Prints one line as it is."""
    print(text)


def print_json(document: Any) -> None:
    """Prints the one JSON document of a command."""
    print(json.dumps(document, indent=2, allow_nan=False))


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, on a terminal only; yields a function to call before each step."""
    bar = Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[step]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=total, step="")
        done = -1

        def advance(step: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, step=step)

        yield advance


def size(count: float) -> str:
    """Bytes for people: "3.1 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """A time for people: "31.2 us"."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds:.2f} s"


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def collapse(names: Sequence[str], keys: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """Joins the experts of one projection that have the same key.

    Returns:
        (a name such as "mlp.experts.{0-127}.up_proj", indices into `names`), in the order of first
        sight.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, (name, key) in enumerate(zip(names, keys, strict=True)):
        groups.setdefault((_EXPERT.sub("{}", name), key), []).append(index)
    joined = []
    for members in groups.values():
        name = names[members[0]]
        if len(members) > 1:
            numbers = [int(found[0]) for i in members if (found := _EXPERT.search(names[i]))]
            name = _EXPERT.sub(f"{{{_ranges(numbers)}}}", name)
        joined.append((name, members))
    return joined
