"""
The compiled core of marlinq. Use the marlinq package; this module's names may change.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "Context",
    "DeviceBuffer",
    "ExpertStack",
    "HostBuffer",
    "HostTensor",
    "Linear",
    "Module",
    "MoeBlock",
    "Schedules",
    "backends",
    "build_note",
    "check_block_options",
    "load_gptq",
    "load_gptq_stacked",
    "moe_align_block_size",
    "moe_align_block_size_into",
    "most_aligned_ids",
    "route",
    "time_blocks",
    "time_forwards",
    "tune",
    "validate",
]

class HostTensor:
    """
    A tensor in host memory that somebody else owns; nothing is copied.

    Args:
        buffer: A numpy array or DLPack object, or with dtype and shape any contiguous bytes, at any alignment.
        dtype: "int32", "float32", "float16" or "bfloat16".
        shape: The extents.

    Raises:
        InvalidArgumentError: For a dtype that no tensor of the format has, or memory that is not contiguous.
    """
    def __init__(
        self,
        buffer: typing.Any,
        dtype: str | None = None,
        shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None,
    ) -> None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

class HostBuffer:
    """
    Zeroed host memory that other libraries take over by DLPack.
    """
    def __dlpack__(
        self,
        *,
        stream: typing.Any = None,
        max_version: typing.Any = None,
        dl_device: typing.Any = None,
        copy: typing.Any = None,
    ) -> typing.Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __init__(
        self, shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], dtype: str
    ) -> None: ...

class Context:
    """
    Device, threads and scratch; used by one thread at a time.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        threads: Host threads of a forward; 0 takes as many as the process may run on.
        stream: A CUDA stream as an integer, which must outlive the context; 0 is the default stream.

    A context whose forwards were captured in a CUDA graph owns memory that the graph uses, and must outlive it.

    Raises:
        UnsupportedError: If no backend of this build runs the device.
        DeviceError: If the device does not exist.
    """
    def __init__(
        self,
        device: str = "cpu",
        threads: typing.SupportsInt | typing.SupportsIndex = 0,
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def copy(self, source: typing.Any, target: typing.Any) -> None:
        """
        Copies [..., cols] to the same shape and dtype, each in host memory or on the device.
        """
    def peak_rate(self, *, compute: str = "auto", kernel: str = "") -> float:
        """
        Operations a second that the arithmetic of a layer cannot pass; 0 where it is not measured.
        """
    def pregrow_marlin_gather_scratch(
        self, required_elements: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Grows the scratch to m_total * (widest matmul input) elements; only ever grows.
        """
    def synchronise(self) -> None:
        """
        Waits for the work of the context's stream.
        """
    @property
    def backend(self) -> str: ...
    @property
    def captured(self) -> bool:
        """
        Whether work of this context was captured in a CUDA graph.
        """
    @property
    def device(self) -> str: ...
    @property
    def scratch_allocations(self) -> int:
        """
        How often the scratch has grown; a repeated size never changes it.
        """
    @property
    def stream(self) -> int:
        """
        The CUDA stream as an integer.
        """
    @property
    def threads(self) -> int: ...

class DeviceBuffer:
    """
    Zeroed memory on a context's device that other libraries take over by DLPack.

    Work of the context's stream is waited for when it is taken over.
    """
    def __dlpack__(
        self,
        *,
        stream: typing.Any = None,
        max_version: typing.Any = None,
        dl_device: typing.Any = None,
        copy: typing.Any = None,
    ) -> typing.Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __init__(
        self,
        context: Context,
        shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        dtype: str,
    ) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

class Schedules:
    """
    Measured schedules: a line for each kind of layer, GPU and rows.
    """
    def __init__(self, text: str) -> None: ...
    def __len__(self) -> int: ...
    @property
    def text(self) -> str: ...

class Module:
    """
    The tensors of one quantised module, borrowed.

    Each tensor is a HostTensor or anything that HostTensor takes.
    """
    def __init__(
        self,
        name: str,
        qweight: typing.Any,
        scales: typing.Any,
        qzeros: typing.Any = None,
        g_idx: typing.Any = None,
        bias: typing.Any = None,
    ) -> None: ...

class Linear:
    """
    A loaded linear layer; immutable, shared by any number of contexts.
    """
    def describe(self) -> dict[str, typing.Any]: ...
    def forward(self, context: Context, x: typing.Any, out: typing.Any) -> None:
        """
        Writes x [..., K] times the weight into out [..., N]; numpy arrays may be of a layer on any device.
        """
    @property
    def backend(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

class ExpertStack:
    """
    The weights of all experts of one projection; immutable.
    """
    def describe(self) -> dict[str, typing.Any]: ...
    def expert(self, index: typing.SupportsInt | typing.SupportsIndex) -> Linear:
        """
        A view of one expert, without a copy.
        """
    def gemm_phase_batched(
        self,
        context: Context,
        x: typing.Any,
        dispatches: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
            ]
        ],
        out: typing.Any,
    ) -> None:
        """
        Dispatches are (expert, input_row, output_row, rows), in any order.
        """
    def gemm_phase_fused(
        self,
        context: Context,
        x: typing.Any,
        sorted_token_ids: typing.Any,
        expert_ids: typing.Any,
        num_tokens_past_padded: typing.Any,
        out: typing.Any,
        *,
        block_size: typing.SupportsInt | typing.SupportsIndex,
        top_k: typing.SupportsInt | typing.SupportsIndex,
        num_tokens: typing.SupportsInt | typing.SupportsIndex,
        topk_weights: typing.Any = None,
        entries: typing.SupportsInt | typing.SupportsIndex | None = None,
    ) -> None:
        """
        Tiles as moe_align_block_size makes them; entries is what num_tokens_past_padded holds, where the caller knows it, and is checked.
        """
    @property
    def backend(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def n_per_expert(self) -> int: ...
    @property
    def num_experts(self) -> int: ...

class MoeBlock:
    """
    A mixture-of-experts block over two expert stacks; immutable.
    """
    def __init__(
        self,
        context: Context,
        gate_up: ExpertStack,
        down: ExpertStack,
        *,
        activation: str = "silu",
        router_weight: str = "output",
        shared_gate_up: Linear | None = None,
        shared_down: Linear | None = None,
        shared_gate: typing.Any = None,
    ) -> None: ...
    def forward(
        self,
        context: Context,
        x: typing.Any,
        topk_ids: typing.Any,
        topk_weights: typing.Any,
        out: typing.Any,
        shared_output: typing.Any = None,
        residual: typing.Any = None,
    ) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...

def backends() -> list[dict[str, typing.Any]]:
    """
    The backends of this build: name, devices, hardware, compute, kernels.
    """

def build_note() -> str:
    """
    Whether the CUDA backend was built, and by what or why not.
    """

def check_block_options(activation: str, router_weight: str) -> None:
    """
    Refuses names that MoeBlock does not take.
    """

def load_gptq(
    context: Context,
    modules: collections.abc.Sequence[Module],
    *,
    bits: typing.SupportsInt | typing.SupportsIndex = 4,
    group_size: typing.SupportsInt | typing.SupportsIndex = 128,
    k: typing.SupportsInt | typing.SupportsIndex = 0,
    zero_points: str = "auto",
    labelled: str = "auto",
    symmetry: str = "unknown",
    compute: str = "auto",
    batch_invariant: bool = False,
    kernel: str = "",
    schedules: Schedules | None = None,
) -> Linear:
    """
    Loads one layer; several modules are fused along N.
    """

def load_gptq_stacked(
    context: Context,
    experts: collections.abc.Sequence[collections.abc.Sequence[Module]],
    *,
    bits: typing.SupportsInt | typing.SupportsIndex = 4,
    group_size: typing.SupportsInt | typing.SupportsIndex = 128,
    k: typing.SupportsInt | typing.SupportsIndex = 0,
    zero_points: str = "auto",
    labelled: str = "auto",
    symmetry: str = "unknown",
    compute: str = "auto",
    batch_invariant: bool = False,
    kernel: str = "",
) -> ExpertStack:
    """
    Loads one layer per expert, all of one shape; modules of an expert are fused along N.
    """

def moe_align_block_size(
    topk_ids: typing.Any,
    block_size: typing.SupportsInt | typing.SupportsIndex,
    num_experts: typing.SupportsInt | typing.SupportsIndex,
    expert_map: typing.Any = None,
) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32], int]:
    """
    (sorted_token_ids i32, expert_ids i32, num_tokens_past_padded).
    """

def moe_align_block_size_into(
    context: Context,
    topk_ids: typing.Any,
    sorted_token_ids: typing.Any,
    expert_ids: typing.Any,
    num_tokens_past_padded: typing.Any,
    *,
    block_size: typing.SupportsInt | typing.SupportsIndex,
    num_experts: typing.SupportsInt | typing.SupportsIndex,
    expert_map: typing.Any = None,
) -> None:
    """
    Writes the lists (i32) on the context's device, padded to their ends.
    """

def most_aligned_ids(
    ids: typing.SupportsInt | typing.SupportsIndex,
    block_size: typing.SupportsInt | typing.SupportsIndex,
    num_experts: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    How many entries sorted_token_ids needs for any routing of so many ids.
    """

def route(
    context: Context,
    logits: typing.Any,
    ids: typing.Any,
    weights: typing.Any,
    *,
    top_k: typing.SupportsInt | typing.SupportsIndex,
    scoring: str = "softmax",
    renormalise: bool = True,
    correction_bias: typing.Any = None,
    num_groups: typing.SupportsInt | typing.SupportsIndex = 1,
    top_groups: typing.SupportsInt | typing.SupportsIndex = 1,
    scale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
) -> None:
    """
    Writes ids (i32 [T, top_k]) and weights (f32 [T, top_k]).
    """

def time_blocks(
    context: Context,
    blocks: collections.abc.Sequence[MoeBlock],
    x: typing.Any,
    topk_ids: collections.abc.Sequence[typing.Any],
    topk_weights: typing.Any,
    out: typing.Any,
    *,
    first: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    As time_forwards, through the blocks and the arrays of topk_ids in turn.
    """

def time_forwards(
    context: Context,
    layers: collections.abc.Sequence[Linear],
    x: typing.Any,
    out: typing.Any,
    *,
    first: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Seconds of `count` forwards without a wait between them, through the layers in turn from `first` on.
    """

def tune(
    context: Context,
    linear: Linear,
    rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    dtype: str = "float16",
) -> list[dict[str, typing.Any]]:
    """
    The quickest schedule of a layer for each of these numbers of rows, and its time.
    """

def validate(
    modules: collections.abc.Sequence[Module],
    *,
    bits: typing.SupportsInt | typing.SupportsIndex = 4,
    group_size: typing.SupportsInt | typing.SupportsIndex = 128,
    k: typing.SupportsInt | typing.SupportsIndex = 0,
    zero_points: str = "auto",
    labelled: str = "auto",
    symmetry: str = "unknown",
) -> dict[str, typing.Any]:
    """
    Checks a layer without loading it and tells what it is.
    """

__version__: str = "0.1.0"
