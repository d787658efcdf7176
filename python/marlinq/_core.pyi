# Hand-written first draft; replaced by the stub generated from the compiled module.
from collections.abc import Sequence
from typing import Any

import numpy

__version__: str

class Context:
    """Device and scratch; used by one thread at a time."""
    def __init__(self, device: str = "cpu", threads: int = 0) -> None: ...
    @property
    def device(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def scratch_allocations(self) -> int: ...
    def pregrow_marlin_gather_scratch(self, required_elements: int) -> None: ...

class HostTensor:
    """A borrowed tensor in host memory. `buffer`: numpy array, DLPack object, or any bytes-like object.
    With dtype ("int32", "float32", "float16", "bfloat16") and shape given, the bytes of `buffer` are read so
    (any alignment); without them they are the array's own."""
    def __init__(self, buffer: Any, dtype: str | None = None, shape: Sequence[int] | None = None) -> None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

class Module:
    """One quantised module; tensors are HostTensor, or anything that HostTensor takes."""
    def __init__(self, name: str, qweight: Any, scales: Any, qzeros: Any = None, g_idx: Any = None, bias: Any = None) -> None: ...

class Linear:
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...
    def forward(self, context: Context, x: Any, out: Any) -> None:
        """x [..., K], out [..., N]: numpy or DLPack, written in place."""

class ExpertStack:
    @property
    def num_experts(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def n_per_expert(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...
    def expert(self, index: int) -> Linear: ...
    def gemm_phase_batched(self, context: Context, x: Any, dispatches: Sequence[tuple[int, int, int, int]], out: Any) -> None:
        """dispatches: (expert, input_row, output_row, rows)"""
    def gemm_phase_fused(self, context: Context, x: Any, sorted_token_ids: Any, expert_ids: Any, num_tokens_past_padded: Any, out: Any, *, block_size: int, top_k: int, num_tokens: int, topk_weights: Any = None) -> None:
        """The three lists are i32 arrays (num_tokens_past_padded: i32 [1])."""

class MoeBlock:
    def __init__(self, context: Context, gate_up: ExpertStack, down: ExpertStack, *, activation: str = "silu", router_weight: str = "output", shared_gate_up: Linear | None = None, shared_down: Linear | None = None, shared_gate: Any = None) -> None:
        """activation: silu, gelu, gelu_tanh, clamped_swiglu. router_weight: output, input. shared_gate: f32 [H] numpy."""
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def forward(self, context: Context, x: Any, topk_ids: Any, topk_weights: Any, out: Any, shared_output: Any = None) -> None: ...

class Buffer:
    """Uninitialised host memory that other libraries take over by DLPack."""
    def __init__(self, shape: Sequence[int], dtype: str) -> None: ...
    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def load_gptq(context: Context, modules: Sequence[Module], *, bits: int = 4, group_size: int = 128, k: int = 0, zero_points: str = "auto", labelled: str = "auto", symmetry: str = "unknown", compute: str = "auto", batch_invariant: bool = False, kernel: str = "") -> Linear:
    """zero_points, labelled: auto, v1, v2. symmetry: unknown, symmetric, asymmetric. Several modules are fused along N."""

def load_gptq_stacked(context: Context, experts: Sequence[Sequence[Module]], *, bits: int = 4, group_size: int = 128, k: int = 0, zero_points: str = "auto", labelled: str = "auto", symmetry: str = "unknown", compute: str = "auto", batch_invariant: bool = False, kernel: str = "") -> ExpertStack: ...

def validate(modules: Sequence[Module], *, bits: int = 4, group_size: int = 128, k: int = 0, zero_points: str = "auto", labelled: str = "auto", symmetry: str = "unknown") -> dict[str, Any]:
    """Checks without loading: k, n, groups, group_size, symmetric, act_order, zero_points, bytes, warnings."""

def route(context: Context, logits: Any, ids: Any, weights: Any, *, top_k: int, scoring: str = "softmax", renormalise: bool = True, correction_bias: Any = None, num_groups: int = 1, top_groups: int = 1, scale: float = 1.0) -> None:
    """Writes ids (i32 [T, top_k]) and weights (f32 [T, top_k])."""

def moe_align_block_size(topk_ids: Any, block_size: int, num_experts: int, expert_map: Any = None) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any], int]:
    """(sorted_token_ids i32, expert_ids i32, num_tokens_past_padded)"""

def backends() -> list[dict[str, Any]]:
    """name, devices, hardware, compute, kernels: [{name, requires, usable, chosen}]"""
