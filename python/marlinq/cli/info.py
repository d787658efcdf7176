"""`marlinq info`: what this build and this machine offer."""

import argparse

import marlinq
from marlinq.cli._arguments import Commands, new_command
from marlinq.cli._output import print_json, print_line, print_table

_EXAMPLES = """\
  marlinq info
  marlinq info --json
"""


def add_command(commands: Commands) -> None:
    """Adds the command to the parser."""
    new_command(commands, "info", _run, "list backends, devices and kernels", _EXAMPLES)


def _run(options: argparse.Namespace) -> int:
    found = marlinq.info()
    if options.json:
        print_json(found)
        return 0
    print_line(f"marlinq {found['version']}, {found['threads']} host threads")
    print_line(f"built {found['build']}")
    for backend in found["backends"]:
        print_line("")
        print_line(f"backend {backend['name']}: {backend['hardware']}")
        print_line(f"  devices  {', '.join(backend['devices']) or 'none'}")
        print_line(f"  compute  {', '.join(backend['compute'])}")
        print_table(
            ("  kernel", "requires", "usable", "chosen"),
            (
                (
                    f"  {kernel['name']}",
                    kernel["requires"],
                    "yes" if kernel["usable"] else "no",
                    "yes" if kernel["chosen"] else "",
                )
                for kernel in backend["kernels"]
            ),
        )
    return 0
