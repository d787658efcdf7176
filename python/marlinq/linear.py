"""Linear layers and expert stacks: handles over the core, and the loaders from raw tensors."""

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from marlinq import _core
from marlinq._arrays import Array, allocate, clear, given, integer, shape_of
from marlinq._context import Call, context_for
from marlinq.errors import InvalidArgumentError, MarlinqWarning, UnsupportedError
from marlinq.schedules import Schedules, handle_of

CHECKPOINT_FORMATS = ("auto", "gptq", "gptq_v2", "gptq_p")


def zero_points_of(checkpoint_format: str, bits: int) -> str:
    """How a checkpoint format stores zero points: "auto", "v1" or "v2".

    Raises:
        InvalidArgumentError: The format is unknown.
        UnsupportedError: The format lays these bits out in another way.
    """
    if checkpoint_format not in CHECKPOINT_FORMATS:
        expected = ", ".join(CHECKPOINT_FORMATS)
        raise InvalidArgumentError(
            f"checkpoint_format: {checkpoint_format!r}, expected one of {expected}"
        )
    if checkpoint_format == "gptq_p" and bits not in (2, 4, 8):
        raise UnsupportedError(
            f"checkpoint_format: gptq_p (planar) at {bits} bits, expected 2, 4 or 8 bits"
        )
    return {"auto": "auto", "gptq": "v1", "gptq_v2": "v2", "gptq_p": "v2"}[checkpoint_format]


def issue_warnings(description: dict[str, Any], stacklevel: int) -> None:
    """Issues what a load has to say; `stacklevel` as in `warnings.warn`, seen from the caller."""
    for message in description["warnings"]:
        warnings.warn(message, MarlinqWarning, stacklevel=stacklevel + 1)


def _summary(description: dict[str, Any]) -> str:
    traits = [f"{description['bits']} bits", f"group {description['group_size']}"]
    traits += [name for name in ("act_order", "bias") if description[name]]
    runs = " ".join(description[name] for name in ("device", "kernel", "compute"))
    return f"{', '.join(traits)}, {runs}"


class Linear:
    """A quantised linear layer, y = x Wᵀ + bias.

    Made by `load_gptq`, `Checkpoint.linear` and `ExpertStack.expert`. Immutable; any number of
    threads may use it at once.
    """

    __slots__ = ("_device", "_handle", "_out_features")

    def __init__(self, handle: _core.Linear) -> None:
        """Wraps the core's object."""
        self._handle = handle
        self._device: str = handle.describe()["device"]
        self._out_features = handle.out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self._handle.in_features

    @property
    def out_features(self) -> int:
        """N, of all fused modules together."""
        return self._out_features

    @property
    def device(self) -> str:
        """Where the weight lies: "cpu", "cuda:0"."""
        return self._device

    def describe(self) -> dict[str, Any]:
        """What was chosen at load: kernel, compute, schedule, padding, bytes, warnings, ..."""
        return self._handle.describe()

    def __call__(
        self, x: Array, *, out: Array | None = None, context: _core.Context | None = None
    ) -> Array:
        """Computes x Wᵀ + bias.

        On a GPU, work goes to the current stream of torch or CuPy, whose arrays are read and
        written where they lie; the call does not wait for it. Arrays of other libraries on the GPU
        are used there too, and the call waits. numpy arrays are copied to the GPU and back, which
        waits as well and cannot be part of a CUDA graph; tensors of torch in host memory are
        refused. A GPU computes with float16 or bfloat16 activations: float32 is rounded to float16.

        Args:
            x: `[..., K]`, float32, float16 or bfloat16, on the layer's device or a numpy array.
            out: `[..., N]` of the dtype of x or float32, to be written, on the layer's device or a
                numpy array; None allocates an array of the library and dtype of x.
            context: Used instead of this thread's own context. Where its stream is not the current
                one of the arrays' library, order the two yourself.

        Returns:
            `out`, or the new array.

        Raises:
            InvalidArgumentError: A shape, dtype or device does not fit, or x requires grad.
        """
        shape = shape_of(x, "x")
        call = Call(self._device, context, x, out)
        if out is None and not shape:
            raise InvalidArgumentError(f"x: 0 dimensions, expected [..., {self.in_features}]")
        output = (
            given(out)
            if out is not None
            else allocate(x, (*shape[:-1], self._out_features), call.context)
        )
        self._handle.forward(call.context, x, output.target)
        call.finish(x, output.target)
        return output.array()

    def tune(
        self, rows: Sequence[int], *, dtype: str = "float16", context: _core.Context | None = None
    ) -> list[dict[str, Any]]:
        """Measures which schedule of a GPU's kernels is the quickest for this layer.

        Takes a second or so for each number of rows, and some hundred MB of the device; nothing
        else should run there. Layers of one shape and format have the same answer.

        Args:
            rows: Ascending numbers of rows of x; each stands for those after the one before it,
                too.
            dtype: Of x, "float16" or "bfloat16".
            context: As of a call.

        Returns:
            A dict for each number of rows and each run of modules with one row order: "us" of the
            "schedule", "estimated_us" of what the library takes without one, "text", the line for
            `Schedules`, and what this consists of: "device", "kernel", "bits", "group_size", "n",
            "k", "first_rows" and "last_rows". Schedule and line are empty where the library's
            choice is the quickest and one that has no words.

        Raises:
            UnsupportedError: The layer is on the CPU.
            InvalidArgumentError: The rows do not ascend from 1, or the dtype is another one.
        """
        return _core.tune(context_for(self._device, context), self._handle, list(rows), dtype)

    def __repr__(self) -> str:
        """Shape, format and kernel."""
        shape = f"{self.in_features} -> {self.out_features}"
        return f"<marlinq.Linear {shape}, {_summary(self.describe())}>"


def _check_dispatches(
    dispatches: Iterable[tuple[int, int, int, int]],
) -> list[tuple[int, int, int, int]]:
    checked = []
    for index, dispatch in enumerate(dispatches):
        try:
            expert, input_row, output_row, rows = (operator.index(number) for number in dispatch)
        except (TypeError, ValueError):
            raise InvalidArgumentError(
                f"dispatches[{index}]: {dispatch!r}, expected four integers: expert, input row, "
                "output row, rows"
            ) from None
        checked.append((expert, input_row, output_row, rows))
    return checked


class ExpertStack:
    """The weights of all experts of one projection.

    Made by `load_gptq_stacked` and `Checkpoint.expert_stack`. `stack[e]` and iteration give the
    experts as `Linear` views. Immutable; any number of threads may use it at once.
    """

    __slots__ = ("_device", "_handle")

    def __init__(self, handle: _core.ExpertStack) -> None:
        """Wraps the core's object."""
        self._handle = handle
        self._device: str = handle.describe()["device"]

    @property
    def num_experts(self) -> int:
        """E."""
        return self._handle.num_experts

    @property
    def k(self) -> int:
        """Input features of every expert."""
        return self._handle.k

    @property
    def n_per_expert(self) -> int:
        """Output features of every expert, of all fused modules together."""
        return self._handle.n_per_expert

    @property
    def device(self) -> str:
        """Where the weights lie: "cpu", "cuda:0"."""
        return self._device

    def describe(self) -> dict[str, Any]:
        """What was chosen at load: kernel, compute, schedule, padding, bytes, warnings, ..."""
        return self._handle.describe()

    def expert(self, index: int) -> Linear:
        """A view of one expert that shares the stack's memory.

        Raises:
            InvalidArgumentError: There is no such expert.
        """
        return Linear(self._handle.expert(index))

    def __len__(self) -> int:
        """The number of experts."""
        return self._handle.num_experts

    def __getitem__(self, index: int) -> Linear:
        """As `expert`, with negative indices counting from the end."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"expert {index} of {count}")
        return self.expert(index % count)

    def __iter__(self) -> Iterator[Linear]:
        """The experts in order."""
        return (self.expert(index) for index in range(len(self)))

    def gemm_phase_batched(
        self,
        x: Array,
        dispatches: Iterable[tuple[int, int, int, int]],
        *,
        out: Array | None = None,
        out_rows: int | None = None,
        context: _core.Context | None = None,
    ) -> Array:
        """Runs ranges of rows through experts of the caller's choice, all in one launch.

        Streams, copies and types of a GPU are as of a `Linear`.

        Args:
            x: `[M, K]`, float32, float16 or bfloat16, on the stack's device or a numpy array.
            dispatches: Tuples (expert, input row, output row, rows), in any order; an empty list is
                fine. No output row may belong to two of them.
            out: `[R, N]` of the dtype of x or float32; rows that no dispatch names stay as they
                are. None allocates an array of the library and dtype of x, with zeros in such rows.
            out_rows: R of that array; None takes as many rows as the dispatches reach.
            context: As of a `Linear`.

        Returns:
            `out`, or the new array.

        Raises:
            InvalidArgumentError: A shape, dtype, device or dispatch does not fit.
        """
        shape_of(x, "x")
        dispatches = _check_dispatches(dispatches)
        call = Call(self._device, context, x, out)
        if out is not None:
            output = given(out)
        else:
            if out_rows is None:
                out_rows = max((first + rows for _, _, first, rows in dispatches), default=0)
            output = allocate(x, (out_rows, self.n_per_expert), call.context)
            if sum(rows for *_, rows in dispatches) != out_rows:
                clear(output, call)
        self._handle.gemm_phase_batched(call.context, x, dispatches, output.target)
        call.finish(x, output.target)
        return output.array()

    def gemm_phase_fused(
        self,
        x: Array,
        sorted_token_ids: Array,
        expert_ids: Array,
        num_tokens_past_padded: Array | int,
        *,
        block_size: int,
        top_k: int,
        num_tokens: int,
        topk_weights: Array | None = None,
        out: Array | None = None,
        context: _core.Context | None = None,
    ) -> Array:
        """Runs the tiles of `moe_align_block_size`, all in one launch.

        Streams, copies and types of a GPU are as of a `Linear`. Arrays are on the stack's device or
        of numpy. What tile lists on a GPU hold is not looked at by the host.

        Args:
            x: `[num_tokens, K]`, float32, float16 or bfloat16.
            sorted_token_ids: int32; input row of an id = id // top_k, output row = id; an id of
                num_tokens * top_k or more is padding.
            expert_ids: int32, one a tile; -1 means "not here", and its rows are written as zeros.
            num_tokens_past_padded: int32 `[1]`, or an int: how many entries of sorted_token_ids
                count.
            block_size: Entries a tile: 8, 16, 32, 48 or 64.
            top_k: Ids a token.
            num_tokens: Rows of x.
            topk_weights: float32 `[num_tokens * top_k]`: each output row is multiplied by its
                weight.
            out: `[num_tokens * top_k, N]` of the dtype of x or float32; None allocates an array of
                the library and dtype of x.
            context: As of a `Linear`.

        Returns:
            `out`, or the new array.

        Raises:
            InvalidArgumentError: A shape, dtype, device or tile does not fit.
        """
        shape_of(x, "x")
        call = Call(self._device, context, x, out, sorted_token_ids)
        entries = None
        if isinstance(num_tokens_past_padded, int | np.integer):
            entries = int(num_tokens_past_padded)
            num_tokens_past_padded = integer(entries, sorted_token_ids, call)
        output = (
            given(out)
            if out is not None
            else allocate(x, (num_tokens * top_k, self.n_per_expert), call.context)
        )
        self._handle.gemm_phase_fused(
            call.context,
            x,
            sorted_token_ids,
            expert_ids,
            num_tokens_past_padded,
            output.target,
            block_size=block_size,
            top_k=top_k,
            num_tokens=num_tokens,
            topk_weights=topk_weights,
            entries=entries,
        )
        call.finish(x, output.target, sorted_token_ids, expert_ids, topk_weights)
        return output.array()

    def __repr__(self) -> str:
        """Shape, format and kernel."""
        shape = f"{self.num_experts} x {self.k} -> {self.n_per_expert}"
        return f"<marlinq.ExpertStack {shape}, {_summary(self.describe())}>"


def load_gptq(
    qweight: Array,
    scales: Array,
    qzeros: Array | None = None,
    g_idx: Array | None = None,
    bias: Array | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    k: int | None = None,
    checkpoint_format: str = "auto",
    device: str = "cpu",
    compute: str = "auto",
    batch_invariant: bool = False,
    kernel: str | None = None,
    schedules: Schedules | None = None,
) -> Linear:
    """Loads a GPTQ linear layer from its tensors in host memory. They are not needed afterwards.

    Args:
        qweight: int32 `[ceil(K * bits / 32), N]`, codes packed along K.
        scales: float32, float16 or bfloat16 `[G, N]` with G = ceil(K / group_size); their values
            are kept exactly.
        qzeros: int32 `[G, ceil(N * bits / 32)]`, packed along N; None means symmetric.
        g_idx: int32 `[K]`, the group of each input row; None means k // group_size.
        bias: float32, float16 or bfloat16 `[N]`.
        bits: 2, 3, 4 or 8.
        group_size: Input rows a group, -1 for one group over all of K.
        k: K, where qweight and g_idx do not tell it.
        checkpoint_format: How zero points are stored: "gptq" (minus 1), "gptq_v2" and "gptq_p" (as
            they are), or "auto", which sees it in the zero points of symmetric weights and else
            means "gptq".
        device: "cpu", "cuda" or "cuda:1".
        compute: Arithmetic on the CPU: "float32" (relative error at most 2e-6), "int16" (5e-5 on
            standard normal x), "bfloat16" (3e-3), "int8" (8e-3), or "auto": int16 where the
            processor has a unit for it, else float32.
        batch_invariant: Whether a row's result must not depend on the other rows, bit for bit.
        kernel: Forces a kernel by a name that `marlinq.info()` lists.
        schedules: Measured ones for a GPU, instead of those that come with the library.

    Raises:
        InvalidArgumentError: A tensor or an option does not fit.
        UnsupportedError: This build or machine cannot do it.
        DeviceError: The device does not exist.
    """
    zero_points = zero_points_of(checkpoint_format, bits)
    handle = _core.load_gptq(
        context_for(device),
        [_core.Module("", qweight, scales, qzeros, g_idx, bias)],
        bits=bits,
        group_size=group_size,
        k=k or 0,
        zero_points=zero_points,
        compute=compute,
        batch_invariant=batch_invariant,
        kernel=kernel or "",
        schedules=handle_of(schedules),
    )
    issue_warnings(handle.describe(), stacklevel=2)
    return Linear(handle)


def _per_expert(
    tensors: Sequence[Array | None] | None, name: str, count: int
) -> list[Array | None]:
    if tensors is None:
        return [None] * count
    if len(tensors) != count:
        raise InvalidArgumentError(
            f"{name}: {len(tensors)} tensors, expected {count}, one per expert as in qweights"
        )
    return list(tensors)


def load_gptq_stacked(
    qweights: Sequence[Array],
    scales: Sequence[Array],
    qzeros: Sequence[Array | None] | None = None,
    g_idx: Sequence[Array | None] | None = None,
    bias: Sequence[Array | None] | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    k: int | None = None,
    checkpoint_format: str = "auto",
    device: str = "cpu",
    compute: str = "auto",
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> ExpertStack:
    """Loads the experts of one projection: lists of the tensors of `load_gptq`, one per expert.

    All experts have the same K, N, bits and group size. Each has its own g_idx, or None.

    Raises:
        InvalidArgumentError: A tensor or an option does not fit, or the lists differ in length.
        UnsupportedError: This build or machine cannot do it.
        DeviceError: The device does not exist.
    """
    zero_points = zero_points_of(checkpoint_format, bits)
    count = len(qweights)
    lists = [
        _per_expert(tensors, name, count)
        for name, tensors in (
            ("qweights", qweights),
            ("scales", scales),
            ("qzeros", qzeros),
            ("g_idx", g_idx),
            ("bias", bias),
        )
    ]
    handle = _core.load_gptq_stacked(
        context_for(device),
        [
            [_core.Module(f"experts.{index}", *tensors)]
            for index, tensors in enumerate(zip(*lists, strict=True))
        ],
        bits=bits,
        group_size=group_size,
        k=k or 0,
        zero_points=zero_points,
        compute=compute,
        batch_invariant=batch_invariant,
        kernel=kernel or "",
    )
    issue_warnings(handle.describe(), stacklevel=2)
    return ExpertStack(handle)
