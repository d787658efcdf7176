"""Checkpoints in safetensors: what they hold, and the layers built from them."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marlinq import _core
from marlinq._config import QuantConfig, read_config
from marlinq._context import context_for
from marlinq._experts import (
    SHARED_NAMES,
    Projections,
    activation_of,
    find_projections,
    router_weight_of,
)
from marlinq._module import FOREIGN_TENSORS, ModuleInfo, ModuleReader, ModuleSpec, Override
from marlinq._safetensors import TensorFiles
from marlinq.errors import InvalidArgumentError, UnsupportedError
from marlinq.linear import ExpertStack, Linear, issue_warnings, zero_points_of
from marlinq.moe import MoeBlock, SharedExpert, check_shared_expert
from marlinq.reference import Weight, widen
from marlinq.schedules import Schedules, handle_of

_NEAR_NAMES = 5


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


class Checkpoint:
    """A GPTQ checkpoint, made by `marlinq.open`.

    Nothing but headers is read before a module is loaded.

    Attributes:
        path: What was opened.
        config: config.json as it is, {} if there is none.
        quantization: What config.json and quantize_config.json say of quantisation.
    """

    def __init__(self, path: Path, override: Override) -> None:
        """Opens the files; see `open`."""
        self.path = path
        self._files = TensorFiles(path)
        self.config, self.quantization = read_config(self._files.directory)
        self._reader = ModuleReader(self._files, self.quantization, override)
        self._names = dict.fromkeys(self._module_names())
        self._infos: dict[str, ModuleInfo] = {}

    def _module_names(self) -> list[str]:
        names = set()
        for tensor in self._files:
            name, _, last = tensor.rpartition(".")
            marlin = last == "B" and f"{name}.s" in self._files
            if last in ("qweight", "weight_packed") or marlin:
                names.add(name)
        return sorted(names, key=_natural_order)

    def __contains__(self, name: object) -> bool:
        """Whether there is a quantised module of this name."""
        return name in self._names

    def __len__(self) -> int:
        """The number of quantised modules."""
        return len(self._names)

    def __repr__(self) -> str:
        """Path, number of modules and method."""
        return f"<marlinq.Checkpoint {str(self.path)!r}, {len(self)} quantised modules>"

    def modules(self) -> list[ModuleInfo]:
        """All quantised modules in natural order, those that cannot be loaded too."""
        return [self.module(name) for name in self._names]

    def module(self, name: str) -> ModuleInfo:
        """One quantised module.

        Raises:
            InvalidArgumentError: There is none of this name; the message lists near ones.
        """
        self._require(name)
        info = self._infos.get(name)
        if info is None:
            info = self._infos[name] = self._reader.info(name)
        return info

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor, quantised or not, as a read-only view into the mapped file.

        bfloat16 comes as its uint16 words.

        Raises:
            InvalidArgumentError: There is none of this name; the message lists near ones.
            InvalidFileError: numpy has no type for it.
        """
        if name not in self._files:
            near = difflib.get_close_matches(name, list(self._files), _NEAR_NAMES)
            raise InvalidArgumentError(f"{name}: no such tensor{_near(near)}")
        return self._files.array(name)

    def reference(self, name: str) -> Weight:
        """A module's tensors for the numpy reference.

        Raises:
            InvalidArgumentError: There is no such quantised module.
            InvalidFileError: A tensor is missing.
            UnsupportedError: It is packed in a way that marlinq does not read.
        """
        self._require(name)
        spec = self._reader.spec(name)
        present = self._reader.present_tensors(name)
        fields: dict[str, Any] = {
            tensor: self._files.array(f"{name}.{tensor}") for tensor in present
        }
        return Weight(**fields, **spec.arguments())

    def _require(self, name: str) -> None:
        if name in self._names:
            return
        weight = self._files.get(f"{name}.weight")
        if weight is not None:
            shape = ", ".join(map(str, weight.shape))
            raise InvalidArgumentError(
                f"{name}: not quantised; its weight is {weight.dtype} [{shape}], to be run as it is"
            )
        near = difflib.get_close_matches(name, list(self._names), _NEAR_NAMES)
        raise InvalidArgumentError(f"{name}: no such module{_near(near)}")

    def _spec_of(self, names: Sequence[str]) -> ModuleSpec:
        """How to read modules that one weight holds; raises where there is no such weight."""
        for name in names:
            self._require(name)
        return self._reader.common_spec(names)

    def linear(
        self,
        name: str | Sequence[str],
        *,
        device: str = "cpu",
        compute: str = "auto",
        batch_invariant: bool = False,
        kernel: str | None = None,
        schedules: Schedules | None = None,
        context: _core.Context | None = None,
    ) -> Linear:
        """Loads a module, or several fused along N in the order given (q, k, v; gate, up).

        Args:
            name: Full path of a module, or a list of them. Fused modules share K, bits and group
                size.
            device: As of `marlinq.load_gptq`, like the other options.
            compute: Arithmetic on the CPU.
            batch_invariant: Whether a row's result must not depend on the other rows.
            kernel: Forces a kernel by name.
            schedules: Measured ones for a GPU, instead of those that come with the library.
            context: Used instead of this thread's own context; its device counts then.

        Raises:
            InvalidArgumentError: A module does not exist, is not quantised or does not fit.
            InvalidFileError: A tensor is missing or damaged.
            UnsupportedError: The module's format, or what this build or machine cannot do.
        """
        names = [name] if isinstance(name, str) else list(name)
        if not names:
            raise InvalidArgumentError("name: an empty list, expected at least one module")
        spec = self._spec_of(names)
        handle = _core.load_gptq(
            context_for(device, context),
            [self._reader.core_module(module) for module in names],
            **spec.arguments(),
            compute=compute,
            batch_invariant=batch_invariant,
            kernel=kernel or "",
            schedules=handle_of(schedules),
        )
        issue_warnings(handle.describe(), stacklevel=2)
        return Linear(handle)

    def expert_stack(
        self,
        prefix: str,
        names: str | Sequence[str],
        *,
        device: str = "cpu",
        compute: str = "auto",
        batch_invariant: bool = False,
        kernel: str | None = None,
        context: _core.Context | None = None,
    ) -> ExpertStack:
        """Loads one projection of all experts: the modules `prefix.E.name` for E from 0.

        Args:
            prefix: Such as "model.layers.0.mlp.experts".
            names: A projection, or several fused along N, such as ["gate_proj", "up_proj"].
            device: As of `linear`, like the other options.
            compute: Arithmetic on the CPU.
            batch_invariant: Whether a row's result must not depend on the other rows.
            kernel: Forces a kernel by name.
            context: Used instead of this thread's own context; its device counts then.

        Raises:
            InvalidArgumentError: There are no such experts, or one is missing, not quantised or
                different.
            InvalidFileError: A tensor is missing or damaged.
            UnsupportedError: The modules' format, or what this build or machine cannot do.
        """
        parts = [names] if isinstance(names, str) else list(names)
        if not parts:
            raise InvalidArgumentError("names: an empty list, expected at least one projection")
        experts = self._expert_modules(prefix, parts)
        spec = self._spec_of([name for expert in experts for name in expert])
        handle = _core.load_gptq_stacked(
            context_for(device, context),
            [[self._reader.core_module(name) for name in expert] for expert in experts],
            **spec.arguments(),
            compute=compute,
            batch_invariant=batch_invariant,
            kernel=kernel or "",
        )
        issue_warnings(handle.describe(), stacklevel=2)
        return ExpertStack(handle)

    def moe(
        self,
        prefix: str,
        *,
        device: str = "cpu",
        compute: str = "auto",
        batch_invariant: bool = False,
        kernel: str | None = None,
        shared_expert: str | SharedExpert | None = "auto",
        activation: str | None = None,
        router_weight: str | None = None,
        context: _core.Context | None = None,
    ) -> MoeBlock:
        """Loads a whole mixture-of-experts block.

        Knows experts named gate_proj, up_proj, down_proj, or w1, w3, w2, or gate_up_proj, down_proj
        below `prefix.experts.E`, a shared expert in `prefix.shared_expert` or
        `prefix.shared_experts`, and its gate in `prefix.shared_expert_gate`.

        Args:
            prefix: Such as "model.layers.0.mlp" or "model.layers.0.block_sparse_moe".
            device: As of `linear`, like the other options.
            compute: Arithmetic on the CPU.
            batch_invariant: Whether a row's result must not depend on the other rows.
            kernel: Forces a kernel by name.
            shared_expert: "auto" loads it if the checkpoint has one; None leaves it out; or the
                pair (gate_up, down), or a callable as of `MoeBlock`. The checkpoint's gate applies
                unless None.
            activation: As of `MoeBlock`; None takes what config.json says.
            router_weight: As of `MoeBlock`; None takes what the model's type says.
            context: Used instead of this thread's own context; its device counts then.

        Raises:
            InvalidArgumentError: The parts are not there, or one is not quantised.
            InvalidFileError: A tensor is missing or damaged.
            UnsupportedError: An activation, a format, or what this build or machine cannot do.
        """
        options: dict[str, Any] = {
            "device": device,
            "compute": compute,
            "batch_invariant": batch_invariant,
            "kernel": kernel,
            "context": context,
        }
        experts = f"{prefix}.experts"
        self._count_experts(experts)
        projections = self._projections(f"{experts}.0")
        activation = activation or activation_of(self.config)
        router_weight = router_weight or router_weight_of(self.config, prefix)
        # What can be refused is refused before the first part is loaded, which may take long.
        _core.check_block_options(activation, router_weight)
        shared: SharedExpert | None = None
        shared_parts: tuple[list[str], str] | None = None
        if not isinstance(shared_expert, str):
            check_shared_expert(shared_expert)
            shared = shared_expert
        elif shared_expert == "auto":
            shared_parts = self._find_shared_expert(prefix)
        else:
            raise InvalidArgumentError(
                f'shared_expert: {shared_expert!r}, expected "auto", None, a pair or a callable'
            )
        has_shared = shared is not None or shared_parts is not None
        shared_gate = self._shared_gate(prefix) if has_shared else None
        for parts in (projections.gate_up, [projections.down]):
            modules = self._expert_modules(experts, parts)
            self._spec_of([name for expert in modules for name in expert])
        gate_up = self.expert_stack(experts, projections.gate_up, **options)
        down = self.expert_stack(experts, projections.down, **options)
        if shared_parts is not None:
            shared = (
                self.linear(shared_parts[0], **options),
                self.linear(shared_parts[1], **options),
            )
        return MoeBlock(
            gate_up,
            down,
            activation=activation,
            shared_expert=shared,
            shared_gate=shared_gate,
            router_weight=router_weight,
            context=context,
        )

    def _expert_modules(self, prefix: str, parts: Sequence[str]) -> list[list[str]]:
        """The modules of each expert that are fused."""
        return [
            [f"{prefix}.{index}.{part}" for part in parts]
            for index in range(self._count_experts(prefix))
        ]

    def _count_experts(self, prefix: str) -> int:
        """How many experts lie below a prefix, numbered from 0 without a gap."""
        start = f"{prefix}."
        numbers = {
            int(number)
            for tensor in self._files
            if tensor.startswith(start)
            and (number := tensor[len(start) :].partition(".")[0]).isdecimal()
        }
        if not numbers:
            holders = {name.rpartition(".experts.")[0] for name in self._names}
            known = sorted(f"{holder}.experts" for holder in holders if holder)
            near = difflib.get_close_matches(prefix, known, _NEAR_NAMES)
            raise InvalidArgumentError(f"{prefix}: no experts here{_near(near)}")
        for expert in range(max(numbers)):
            if expert not in numbers:
                raise InvalidArgumentError(
                    f"{prefix}.{expert}: missing; expected the experts 0 to {max(numbers)}"
                )
        return len(numbers)

    def _children(self, prefix: str) -> set[str]:
        """Names of the linears directly below a prefix, quantised or not."""
        start = f"{prefix}."
        leaves = ("qweight", "weight", *FOREIGN_TENSORS)
        below = (tensor[len(start) :] for tensor in self._files if tensor.startswith(start))
        parts = (tensor.rpartition(".") for tensor in below)
        return {name for name, _, leaf in parts if name and leaf in leaves}

    def _projections(self, prefix: str) -> Projections:
        children = self._children(prefix)
        projections = find_projections(children)
        if projections is None:
            raise UnsupportedError(
                f"{prefix}: holds {', '.join(sorted(children))}; expected gate_proj, up_proj and "
                "down_proj, or gate_up_proj and down_proj, or w1, w3 and w2"
            )
        return projections

    def _find_shared_expert(self, prefix: str) -> tuple[list[str], str] | None:
        """The modules gate_up, to be fused, and down of the checkpoint's own shared expert."""
        for name in SHARED_NAMES:
            shared = f"{prefix}.{name}"
            if not self._children(shared):
                continue
            projections = self._projections(shared)
            for part in (*projections.gate_up, projections.down):
                if f"{shared}.{part}" not in self:
                    raise InvalidArgumentError(
                        f"{shared}.{part}: not quantised; pass shared_expert= a callable that runs "
                        "it, or None to leave it out"
                    )
            gate_up = [f"{shared}.{part}" for part in projections.gate_up]
            down = f"{shared}.{projections.down}"
            for names in (gate_up, [down]):
                self._spec_of(names)
            return gate_up, down
        return None

    def _shared_gate(self, prefix: str) -> np.ndarray[Any, Any] | None:
        """The shared expert's gate as float32 `[H]`, None if there is none."""
        name = f"{prefix}.shared_expert_gate"
        if name in self:
            return self.reference(name).dequantize(np.float32).reshape(-1)
        if f"{name}.weight" in self._files:
            return widen(self._files.array(f"{name}.weight")).astype(np.float32).reshape(-1)
        return None


def _near(names: Sequence[str]) -> str:
    return f"; near names: {', '.join(names)}" if names else ""


def open(
    path: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    checkpoint_format: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
        path: A directory (with an index, or any *.safetensors), a safetensors file or an index. The
            configuration is looked for in the same directory.
        bits: Overrides what tensors and configuration say, for every module.
        group_size: The same.
        checkpoint_format: Overrides how zero points are stored: "gptq", "gptq_v2" or "gptq_p". None
            and "auto" see it in the zero points of symmetric weights, and else believe the
            configuration.

    Raises:
        FileNotFoundError: The path does not exist.
        InvalidFileError: A file is damaged, or index and shards do not agree. A single module that
            cannot be loaded does not matter here.
        InvalidArgumentError: An override is unknown.
    """
    if checkpoint_format is not None:
        zero_points_of(checkpoint_format, 4)
    layout = None if checkpoint_format == "auto" else checkpoint_format
    return Checkpoint(Path(path), Override(bits, group_size, layout))


__all__ = ["Checkpoint", "ModuleInfo", "QuantConfig", "open"]
