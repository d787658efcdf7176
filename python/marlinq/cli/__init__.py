"""The command `marlinq`."""

import argparse
import os
import sys
from collections.abc import Sequence

import marlinq
from marlinq.cli import bench, info, inspect, tune, verify
from marlinq.errors import MarlinqError

_DESCRIPTION = "Run and check the layers of 4-bit GPTQ checkpoints."
_EPILOG = """\
examples:
  marlinq info                              what this machine runs
  marlinq inspect path/to/checkpoint        every quantised module and what would run it
  marlinq verify path/to/checkpoint         every module against an independent reference
  marlinq bench --shapes 4096x4096 --rows 1,16
  marlinq tune path/to/checkpoint --device cuda --output schedules.txt

exit codes:
  0  all is well
  1  verify: a module failed or cannot be loaded
  2  wrong usage, or a checkpoint that cannot be read
"""
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlinq",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"marlinq {marlinq.__version__}")
    parser.add_argument(
        "--cmake-dir",
        action="version",
        version=marlinq.get_cmake_dir(),
        help="print the directory of marlinqConfig.cmake and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, inspect, verify, bench, tune):
        command.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, 1 where `verify` found a module wanting, 2 for wrong usage or unreadable
            files.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output left, as `head` does. Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except OSError as error:
        print(f"marlinq: {error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
        return _EXIT_USAGE
    except MarlinqError as error:
        print(f"marlinq: {error}", file=sys.stderr)
        return _EXIT_USAGE
    return code
