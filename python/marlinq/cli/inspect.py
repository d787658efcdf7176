"""`marlinq inspect`: what a checkpoint holds and what would run it."""

import argparse
from typing import Any

from marlinq import _core
from marlinq._context import context_for
from marlinq.checkpoint import Checkpoint, ModuleInfo
from marlinq.cli._arguments import Commands, add_checkpoint_options, new_command, open_from, select
from marlinq.cli._output import collapse, print_json, print_line, print_table, progress, size

_EXAMPLES = """\
  marlinq inspect path/to/checkpoint
  marlinq inspect path/to/checkpoint --modules '*.mlp.*' --all
  marlinq inspect path/to/checkpoint --json
"""


def add_command(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = new_command(
        commands, "inspect", _run, "list the quantised modules of a checkpoint", _EXAMPLES
    )
    add_checkpoint_options(parser)
    parser.add_argument("--device", default="cpu", help="where it would run (default: cpu)")
    parser.add_argument("--all", action="store_true", help="list each expert in a row of its own")


def _chosen_kernel(device: str) -> str:
    name = context_for(device).backend
    kernels = (
        kernel["name"]
        for backend in _core.backends()
        if backend["name"] == name
        for kernel in backend["kernels"]
        if kernel["chosen"]
    )
    return f"{name} {', '.join(kernels)}"


def _summary(checkpoint: Checkpoint, modules: list[ModuleInfo]) -> dict[str, Any]:
    supported = sum(info.supported for info in modules)
    return {
        "modules": len(modules),
        "supported": supported,
        "unsupported": len(modules) - supported,
        "bytes": sum(info.bytes for info in modules),
        "quant_method": checkpoint.quantization.method,
        "bits": checkpoint.quantization.bits,
        "group_size": checkpoint.quantization.group_size,
        "checkpoint_format": checkpoint.quantization.checkpoint_format,
    }


def _properties(info: ModuleInfo) -> tuple[object, ...]:
    if info.reason is not None:
        return (
            info.bits,
            info.group_size,
            "",
            "",
            info.k,
            info.n,
            info.reason.replace(info.name, ""),
        )
    zeros = "sym" if info.symmetric else "asym"
    order = "yes" if info.act_order else ""
    return (info.bits, info.group_size, f"{zeros} {info.zero_points}", order, info.k, info.n, None)


def _print(modules: list[ModuleInfo], kernel: str, *, each: bool) -> None:
    names = [info.name for info in modules]
    properties = [_properties(info) for info in modules]
    groups = [(name, [i]) for i, name in enumerate(names)] if each else collapse(names, properties)
    rows = []
    for name, members in groups:
        bits, group, zeros, order, k, n, reason = properties[members[0]]
        first = modules[members[0]]
        runs = kernel if reason is None else f"unsupported: {first.reason}"
        shape = f"{'?' if k is None else k} x {'?' if n is None else n}"
        total = size(sum(modules[i].bytes for i in members))
        rows.append((name, bits, group, zeros, order, shape, total, first.checkpoint_format, runs))
    print_table(
        ("module", "bits", "group", "zeros", "act-order", "K x N", "size", "format", "runs on"),
        rows,
        numeric=("bits", "group", "K x N", "size"),
    )


def _run(options: argparse.Namespace) -> int:
    checkpoint = open_from(options)
    modules = select(checkpoint, options.modules)
    kernel = _chosen_kernel(options.device)
    with progress("inspecting", len(modules)) as advance:
        for info in modules:
            advance(info.name)
            _ = info.supported  # looks into the tensors once; the answer is kept
    summary = _summary(checkpoint, modules)
    if options.json:
        listed = [info.as_dict() for info in modules]
        print_json(
            {
                "checkpoint": str(checkpoint.path),
                "kernel": kernel,
                "modules": listed,
                "summary": summary,
            }
        )
        return 0
    if modules:
        _print(modules, kernel, each=options.all)
        print_line("")
    labels = [
        f"{key} {summary[key]}"
        for key in ("quant_method", "bits", "group_size", "checkpoint_format")
        if summary[key] is not None
    ]
    print_line(
        f"{summary['modules']} quantised modules, {size(summary['bytes'])}, "
        f"{summary['unsupported']} unsupported; configuration: {', '.join(labels) or 'none'}"
    )
    return 0
