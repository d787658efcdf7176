"""`marlinq tune`: the quickest schedules of layers on this GPU."""

import argparse
from pathlib import Path
from typing import Any

from marlinq._context import context_for
from marlinq.cli._arguments import (
    Commands,
    add_checkpoint_options,
    new_command,
    rows_list,
)
from marlinq.cli._cases import Case, checkpoint_cases, random_cases, shapes_list
from marlinq.cli._output import print_json, print_line, print_table, progress
from marlinq.errors import InvalidArgumentError

_EXAMPLES = """\
  marlinq tune path/to/checkpoint --device cuda --output schedules.txt
  marlinq tune --shapes 6144x4096,28672x4096 --device cuda --output schedules.txt

Which kernel runs a layer, and how it is cut, is an estimate of the library's, or a schedule that
was measured on the same GPU. This measures: every schedule that there is for each number of rows,
with weights that come from memory. What is quicker than the estimate goes to the output, a line for
each, which `marlinq.Schedules.read` takes for the `schedules` argument of the loaders. A number of
rows stands for those after the one before it, too. Modules that an engine fuses (q, k and v; gate
and up) are one layer of all their features: name it by --shapes. A number of rows takes about a
second; nothing else should run on the GPU.
"""
_KEY = ("bits", "group_size", "n", "k", "first_rows")
_ROWS = "1,2,4,8,16,24,32,48,64,80,96,112,128,160,192,224,256,320,384,448,512"


def add_command(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = new_command(
        commands, "tune", _run, "find the quickest schedules of layers on a GPU", _EXAMPLES
    )
    add_checkpoint_options(parser, optional=True)
    parser.add_argument("--device", default="cuda", help="the GPU (default: cuda)")
    parser.add_argument("--kernel", metavar="NAME", help="force a kernel that `marlinq info` lists")
    parser.add_argument(
        "--shapes", type=shapes_list, metavar="NxK,...", help="random weights of these shapes"
    )
    parser.add_argument(
        "--rows",
        type=rows_list,
        default=rows_list(_ROWS),
        help=f"ascending row counts (default: {_ROWS})",
    )
    parser.add_argument(
        "--dtype", default="float16", help="of the activations: float16 or bfloat16"
    )
    parser.add_argument(
        "--least-gain",
        type=float,
        default=1.5,
        metavar="PERCENT",
        help="the gain from which on a schedule is worth a line (default: 1.5)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the lines go")
    # Which a GPU does not have.
    parser.set_defaults(compute="auto")


def _gain(found: dict[str, Any]) -> float:
    return 100.0 * (float(found["estimated_us"]) / float(found["us"]) - 1.0)


def _print(name: str, tuned: list[dict[str, Any]]) -> None:
    rows = [
        (
            name,
            f"{found['n']}x{found['k']}",
            f"{found['first_rows']}-{found['last_rows']}",
            f"{found['estimated_us']:.1f}",
            f"{found['us']:.1f}",
            f"{_gain(found):.1f}",
            found["schedule"],
        )
        for found in tuned
    ]
    columns = ("layer", "N x K", "rows", "estimate us", "best us", "gain %", "schedule")
    print_table(columns, rows, numeric=columns[1:6])


def _cases(options: argparse.Namespace, context: Any) -> list[Case]:
    if (options.checkpoint is None) == (options.shapes is None):
        raise InvalidArgumentError("tune: expected a checkpoint or --shapes, and not both")
    cases = random_cases if options.checkpoint is None else checkpoint_cases
    return list(cases(options, context))


def _run(options: argparse.Namespace) -> int:
    context = context_for(options.device)
    cases = _cases(options, context)
    if options.output is not None:
        options.output.touch()  # rather now than after minutes
    found: list[dict[str, Any]] = []
    lines: dict[tuple[Any, ...], str] = {}
    with progress("tuning", len(cases)) as advance:
        for case in cases:
            advance(case.name)
            layer = case.load()
            tuned = layer.tune(options.rows, dtype=options.dtype, context=context)
            found += [{"layer": case.name, **one} for one in tuned]
            for one in tuned:
                # Layers that differ in zero points alone are one kind.
                key = tuple(one[name] for name in _KEY)
                line = one["text"] if _gain(one) >= options.least_gain else ""
                lines.setdefault(key, line)
            if not options.json:
                _print(case.name, tuned)
    if options.json:
        print_json({"device": options.device, "dtype": options.dtype, "layers": found})
    if options.output is not None:
        options.output.write_text("".join(lines.values()), encoding="utf-8")
        if not options.json:
            print_line(f"{options.output}: {sum(map(bool, lines.values()))} lines")
    return 0
