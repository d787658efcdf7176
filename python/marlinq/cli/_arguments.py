"""Options that several commands share."""

import argparse
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from marlinq import _core, errors
from marlinq.checkpoint import Checkpoint, ModuleInfo
from marlinq.checkpoint import open as open_checkpoint

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def new_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A command's parser, with --json."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else"
    )
    parser.set_defaults(run=run)
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The checkpoint, and what `marlinq.open` takes."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?" if optional else None,
        help="a directory, a safetensors file or an index",
    )
    parser.add_argument("--bits", type=positive, help="override the bits of every module")
    parser.add_argument("--group-size", type=int, help="override the group size, -1 for one group")
    parser.add_argument(
        "--checkpoint-format", metavar="NAME", help="override it: gptq, gptq_v2 or gptq_p"
    )
    parser.add_argument("--modules", metavar="GLOB", help="only modules whose path matches")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """What the loaders take besides the device."""
    parser.add_argument(
        "--compute", default="auto", metavar="NAME", help="arithmetic: auto, float32, int16, ..."
    )
    parser.add_argument("--kernel", metavar="NAME", help="force a kernel that `marlinq info` lists")
    parser.add_argument("--threads", type=positive, default=0, help="host threads (default: all)")


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer of at least 1")
    return value


def rows_list(text: str) -> list[int]:
    """Row counts: "1,5,33"."""
    return [positive(part) for part in text.split(",")]


def open_from(options: argparse.Namespace) -> Checkpoint:
    """Opens the checkpoint that the command names."""
    return open_checkpoint(
        options.checkpoint,
        bits=options.bits,
        group_size=options.group_size,
        checkpoint_format=options.checkpoint_format,
    )


def check_load_options(options: argparse.Namespace, context: _core.Context) -> None:
    """Checks --kernel and --compute once, so that a misspelt name is not every module's failure.

    Raises:
        InvalidArgumentError: The context's backend lists no such name.
    """
    backend = next(entry for entry in _core.backends() if entry["name"] == context.backend)
    kernels = [kernel["name"] for kernel in backend["kernels"]]
    if options.kernel is not None and options.kernel not in kernels:
        raise errors.InvalidArgumentError(
            f"--kernel {options.kernel}: expected one of {', '.join(kernels)}"
        )
    if options.compute not in ("auto", *backend["compute"]):
        names = ", ".join(("auto", *backend["compute"]))
        raise errors.InvalidArgumentError(f"--compute {options.compute}: expected one of {names}")


def arithmetic(description: dict[str, Any]) -> str:
    """What a layer computes with where x is float32, or float16 on a GPU, which x decides there."""
    return "float16" if description["backend"] == "cuda" else str(description["compute"])


def select(checkpoint: Checkpoint, pattern: str | None) -> list[ModuleInfo]:
    """The modules that --modules leaves.

    Raises:
        InvalidArgumentError: It leaves none of those there are.
    """
    modules = checkpoint.modules()
    chosen = [info for info in modules if pattern is None or fnmatchcase(info.name, pattern)]
    if modules and not chosen:
        raise errors.InvalidArgumentError(
            f"--modules {pattern}: matches none of {len(modules)} modules"
        )
    return chosen
