"""The layers that commands measure: random ones, and those of a checkpoint."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from marlinq import _core
from marlinq.cli._arguments import open_from, positive, select
from marlinq.errors import InvalidArgumentError
from marlinq.linear import Linear
from marlinq.reference import Weight
from marlinq.schedules import Schedules, handle_of

DEFAULT_SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"
SEED = 20240229


@dataclass(frozen=True)
class Case:
    """A weight to measure; `load` makes a fresh copy of it."""

    name: str
    count: int
    bits: int
    group_size: int
    load: Callable[[], Linear]
    reference: Weight


def shapes_list(text: str) -> list[tuple[int, int]]:
    """Shapes: "4096x4096,14336x4096"."""
    shapes = []
    for part in text.split(","):
        n, separator, k = part.lower().partition("x")
        if not separator:
            raise argparse.ArgumentTypeError(f"{part!r}, expected NxK such as 14336x4096")
        shapes.append((positive(n), positive(k)))
    return shapes


def random_weight(n: int, k: int, bits: int, group_size: int, seed: int) -> Weight:
    """A symmetric weight of random codes."""
    random = np.random.default_rng(seed)
    words = -(-k * bits // 32)
    groups = 1 if group_size == -1 else -(-k // group_size)
    qweight = random.integers(0, 1 << 32, (words, n), np.uint32).view(np.int32)
    scales = random.uniform(0.5, 1.5, (groups, n)) / (1 << bits)
    return Weight(qweight, scales.astype(np.float16), bits=bits, group_size=group_size, k=k)


def random_module(weight: Weight) -> _core.Module:
    """The same for the core."""
    return _core.Module("random", weight.qweight, weight.scales)


def load_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say to the core's loaders."""
    return {"compute": options.compute, "kernel": options.kernel or ""}


def random_format(options: argparse.Namespace) -> tuple[int, int]:
    """Bits and group size of random weights."""
    return options.bits or 4, 128 if options.group_size is None else options.group_size


def random_cases(
    options: argparse.Namespace, context: _core.Context, schedules: Schedules | None = None
) -> Iterator[Case]:
    """Weights of the shapes that --shapes names."""
    bits, group_size = random_format(options)
    for n, k in options.shapes or shapes_list(DEFAULT_SHAPES):
        weight = random_weight(n, k, bits, group_size, SEED)

        def load(weight: Weight = weight, k: int = k) -> Linear:
            return Linear(
                _core.load_gptq(
                    context,
                    [random_module(weight)],
                    bits=bits,
                    group_size=group_size,
                    k=k,
                    **load_arguments(options),
                    schedules=handle_of(schedules),
                )
            )

        yield Case(f"{n}x{k}", 1, bits, group_size, load, weight)


def checkpoint_cases(
    options: argparse.Namespace, context: _core.Context, schedules: Schedules | None = None
) -> Iterator[Case]:
    """The modules of a checkpoint, of those that are alike one.

    Raises:
        InvalidArgumentError: There is none that can be loaded.
    """
    checkpoint = open_from(options)
    alike: dict[tuple[object, ...], list[str]] = {}
    formats = {}
    for info in select(checkpoint, options.modules):
        if info.supported:
            key = (info.n, info.k, info.bits, info.group_size, info.symmetric, info.act_order)
            alike.setdefault(key, []).append(info.name)
            formats[info.name] = (info.bits, info.group_size)
    if not alike:
        raise InvalidArgumentError(f"{checkpoint.path}: no module that marlinq can load")
    for names in alike.values():
        name = names[0]

        def load(name: str = name) -> Linear:
            return checkpoint.linear(
                name,
                compute=options.compute,
                kernel=options.kernel,
                schedules=schedules,
                context=context,
            )

        yield Case(name, len(names), *formats[name], load, checkpoint.reference(name))
