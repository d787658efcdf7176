"""`marlinq verify`: every module of a checkpoint against the independent reference."""

import argparse
import math
import warnings
from typing import Any

import numpy as np

from marlinq import _core
from marlinq.checkpoint import Checkpoint, ModuleInfo
from marlinq.cli._arguments import (
    Commands,
    add_checkpoint_options,
    add_load_options,
    arithmetic,
    check_load_options,
    new_command,
    open_from,
    rows_list,
    select,
)
from marlinq.cli._output import collapse, print_json, print_line, print_table, progress
from marlinq.errors import InvalidFileError, MarlinqError, MarlinqWarning
from marlinq.reference import BOUNDS

_EXAMPLES = """\
  marlinq verify path/to/checkpoint
  marlinq verify path/to/checkpoint --modules '*.layers.0.*' --rows 1,128
  marlinq verify path/to/checkpoint --compute float32 --json

The error is the relative Frobenius norm against float64 on standard normal x; outputs of less than
256 elements are measured against sqrt(sum of x^2 w^2), with three times the bound.

exit codes:
  0  all modules passed
  1  a module failed or cannot be loaded
  2  wrong usage, or a checkpoint that cannot be read
"""
_SEED = 20240229


def add_command(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = new_command(
        commands, "verify", _run, "compare every module with an independent reference", _EXAMPLES
    )
    add_checkpoint_options(parser)
    add_load_options(parser)
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--rows", type=rows_list, default=[1, 5, 33], help="row counts (default: 1,5,33)"
    )
    parser.add_argument("--all", action="store_true", help="list each expert in a row of its own")


def _verify(
    checkpoint: Checkpoint, info: ModuleInfo, options: argparse.Namespace, context: _core.Context
) -> dict[str, Any]:
    result: dict[str, Any] = {"name": info.name, "ok": False, "rows": [], "reason": None}
    try:
        layer = checkpoint.linear(
            info.name, compute=options.compute, kernel=options.kernel, context=context
        )
        weight = checkpoint.reference(info.name)
        chosen = layer.describe()
        result |= {key: chosen[key] for key in ("backend", "kernel")}
        result["compute"] = arithmetic(chosen)
        bound = BOUNDS[result["compute"]]
        # A GPU rounds float32 to float16, so it gets that, and the reference the same.
        dtype = np.float32 if chosen["backend"] == "cpu" else np.float16
        x = np.random.default_rng(_SEED).standard_normal((max(options.rows), layer.in_features))
        x = x.astype(dtype)
        expected = weight.product(x)
        for rows in options.rows:
            out = np.empty((rows, layer.out_features), np.float32)
            error, factor = expected.error(layer(x[:rows], out=out, context=context))
            result["rows"].append(
                {
                    "m": rows,
                    "error": error if math.isfinite(error) else None,
                    "bound": bound * factor,
                    "ok": error <= bound * factor,
                }
            )
        result["ok"] = all(row["ok"] for row in result["rows"])
    except MarlinqError as error:
        result["reason"] = str(error)
    return result


def _error(row: dict[str, Any]) -> float:
    return math.inf if row["error"] is None else float(row["error"])


def _print(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    names = [result["name"] for result in results]
    keys = [
        (result["ok"], result.get("kernel"), (result["reason"] or "").replace(result["name"], ""))
        for result in results
    ]
    each = options.all
    groups = [(name, [i]) for i, name in enumerate(names)] if each else collapse(names, keys)
    table = []
    for name, members in groups:
        first = results[members[0]]
        errors = [
            f"{max(_error(results[i]['rows'][position]) for i in members):.1e}"
            if first["rows"]
            else ""
            for position in range(len(options.rows))
        ]
        bound = f"{first['rows'][-1]['bound']:.0e}" if first["rows"] else ""
        kernel = f"{first['kernel']} {first['compute']}" if "kernel" in first else ""
        verdict = "ok" if first["ok"] else f"FAIL {first['reason'] or ''}".rstrip()
        table.append((name, kernel, *errors, bound, verdict))
    columns = [f"m={rows}" for rows in options.rows]
    print_table(
        ("module", "kernel", *columns, "bound", "result"), table, numeric=(*columns, "bound")
    )


def _run(options: argparse.Namespace) -> int:
    checkpoint = open_from(options)
    modules = select(checkpoint, options.modules)
    if not modules:
        raise InvalidFileError(f"{checkpoint.path}: holds no quantised module")
    context = _core.Context(options.device, options.threads)
    check_load_options(options, context)
    results = []
    with progress("verifying", len(modules)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", MarlinqWarning)
        for info in modules:
            advance(info.name)
            results.append(_verify(checkpoint, info, options, context))
    failed = sum(not result["ok"] for result in results)
    if options.json:
        print_json(
            {
                "checkpoint": str(checkpoint.path),
                "modules": results,
                "passed": len(results) - failed,
                "failed": failed,
            }
        )
    else:
        _print(results, options)
        print_line("")
        print_line(f"{len(results) - failed} of {len(results)} modules ok, {failed} failed")
    return 1 if failed else 0
