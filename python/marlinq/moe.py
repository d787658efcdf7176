"""Mixture-of-experts blocks and the routing that feeds them."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from marlinq import _core
from marlinq._arrays import Array, allocate, device_of, given, same_kind, shape_of, to_float32
from marlinq._context import Call, context_for
from marlinq.errors import InvalidArgumentError
from marlinq.linear import ExpertStack, Linear

SharedExpert: TypeAlias = tuple[Linear, Linear] | Callable[[Any], Any]
"""The linears (gate_up, down), or a function of x `[T, H]` that returns `[T, H]`."""


def check_shared_expert(shared_expert: Any) -> None:
    """Checks the type of a shared expert.

    Raises:
        InvalidArgumentError: It is neither None, nor a pair of linears, nor a callable.
    """
    if shared_expert is None or callable(shared_expert):
        return
    parts = tuple(shared_expert) if isinstance(shared_expert, tuple | list) else ()
    if len(parts) != 2 or not all(isinstance(part, Linear) for part in parts):
        raise InvalidArgumentError(
            f"shared_expert: {type(shared_expert).__name__}, expected the pair (gate_up, down) of "
            "Linear, or a callable"
        )


class MoeBlock:
    """A whole mixture-of-experts block: tokens and their routing in, combined output out.

    Made from two expert stacks, or by `Checkpoint.moe`. Immutable; any number of threads may use it
    at once, if the callable of its shared expert can.
    """

    __slots__ = ("_device", "_handle", "_parts", "_shared_function")

    def __init__(
        self,
        gate_up: ExpertStack,
        down: ExpertStack,
        *,
        activation: str = "silu",
        shared_expert: SharedExpert | None = None,
        shared_gate: Array | None = None,
        router_weight: str = "output",
        context: _core.Context | None = None,
    ) -> None:
        """Joins the stacks; nothing is copied but `shared_gate`.

        Args:
            gate_up: Stack with k = H and n = 2 I, the gate's columns first.
            down: Stack with k = I and n = H.
            activation: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
            shared_expert: An expert that every token passes: its linears (gate_up, down), or a
                callable that takes x `[T, H]` and returns `[T, H]`, called at each forward.
            shared_gate: `[H]` or `[1, H]`; the shared expert's output of a token x is multiplied by
                sigmoid(x · shared_gate). Copied as float32.
            router_weight: Where a routing weight applies: to an expert's "output" or "input" (Llama
                4).
            context: Used instead of this thread's own context.

        Raises:
            InvalidArgumentError: The parts do not fit together.
        """
        self._device = gate_up.device
        check_shared_expert(shared_expert)
        self._shared_function: Callable[[Any], Any] | None = None
        shared: tuple[Linear, Linear] | None = None
        if callable(shared_expert):
            self._shared_function = shared_expert
        elif shared_expert is not None:
            shared = (shared_expert[0], shared_expert[1])
        elif shared_gate is not None:
            raise InvalidArgumentError("shared_gate: given without shared_expert")
        self._handle = _core.MoeBlock(
            context_for(self._device, context),
            gate_up._handle,
            down._handle,
            activation=activation,
            router_weight=router_weight,
            shared_gate_up=None if shared is None else shared[0]._handle,
            shared_down=None if shared is None else shared[1]._handle,
            shared_gate=None if shared_gate is None else to_float32(shared_gate),
        )
        self._parts: dict[str, Any] = {
            "gate_up": gate_up.describe(),
            "down": down.describe(),
            "activation": activation,
            "router_weight": router_weight,
            "shared_expert": None
            if shared_expert is None
            else "callable"
            if shared is None
            else {"gate_up": shared[0].describe(), "down": shared[1].describe()},
            "shared_gate": shared_gate is not None,
        }

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._handle.hidden_size

    @property
    def num_experts(self) -> int:
        """E, without the shared expert."""
        return self._handle.num_experts

    @property
    def device(self) -> str:
        """Where the weights lie: "cpu", "cuda:0"."""
        return self._device

    def describe(self) -> dict[str, Any]:
        """The descriptions of the parts, and how they are joined."""
        return dict(self._parts)

    def __call__(
        self,
        x: Array,
        topk_ids: Array,
        topk_weights: Array,
        *,
        shared_output: Array | None = None,
        residual: Array | None = None,
        out: Array | None = None,
        context: _core.Context | None = None,
    ) -> Array:
        """Runs the block.

        Arrays are on the block's device or of numpy, and used or copied as those of a `Linear`. On
        a GPU nothing is read by the host, so that the call can be captured in a CUDA graph, whose
        replays route as the arrays say then; an id there that is no expert counts as -1.

        Args:
            x: `[T, H]`, float32, float16 or bfloat16.
            topk_ids: `[T, top_k]`, int32 or int64, top_k from 1 to 16; -1 means "not here".
            topk_weights: `[T, top_k]`, float32.
            shared_output: `[T, H]`, float32, float16 or bfloat16, added as it is: the output of a
                shared expert, for blocks that have none.
            residual: `[T, H]` of the dtype of x or float32, added to the output before it is
                rounded; may be `out`.
            out: `[T, H]` of the dtype of x or float32; None allocates an array of the library and
                dtype of x.
            context: As of a `Linear`.

        Returns:
            `out`, or the new array.

        Raises:
            InvalidArgumentError: A shape, dtype or device does not fit, or an id in host memory.
        """
        shape = shape_of(x, "x")
        call = Call(self._device, context, x, out, topk_ids, topk_weights)
        output = given(out) if out is not None else allocate(x, shape, call.context)
        if self._shared_function is not None:
            if shared_output is not None:
                raise InvalidArgumentError(
                    "shared_output: given, but the block runs a shared expert itself"
                )
            shared_output = self._shared_function(x)
            if shared_output is None:
                raise InvalidArgumentError(
                    "shared_expert: the callable returned None, expected [T, H]"
                )
        self._handle.forward(
            call.context,
            x,
            topk_ids,
            topk_weights,
            output.target,
            shared_output=shared_output,
            residual=residual,
        )
        call.finish(x, output.target, topk_ids, topk_weights, shared_output, residual)
        return output.array()

    def __repr__(self) -> str:
        """Shape, activation and kernel."""
        gate_up = self._parts["gate_up"]
        return (
            f"<marlinq.MoeBlock {self.num_experts} experts, hidden {self.hidden_size}, "
            f"inner {gate_up['n'] // 2}, {self._parts['activation']}, {gate_up['bits']} bits, "
            f"{self._device} {gate_up['kernel']} {gate_up['compute']}>"
        )


def route(
    logits: Array,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = True,
    correction_bias: Array | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    context: _core.Context | None = None,
) -> tuple[Array, Array]:
    """Chooses experts for each token, on the device of the logits.

    On a GPU, work goes to the current stream as a `Linear`'s does, and can be captured in a CUDA
    graph. Scores are float64 on the CPU and float32 on a GPU.

    Args:
        logits: `[T, E]`, float32, float16 or bfloat16.
        top_k: Experts a token, 1 to 16.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        renormalise: Whether to divide the chosen weights by their sum.
        correction_bias: float32 `[E]` in host memory, added to the scores for the choice alone.
        num_groups: The experts form this many equal groups.
        top_groups: Only the best so many groups are chosen from.
        scale: The weights are multiplied by it at the end.
        context: Used instead of this thread's own context for the device of logits.

    Returns:
        ids int32 `[T, top_k]` by falling score (equal scores: the lower index first) and weights
        float32 `[T, top_k]`, of the library of logits.

    Raises:
        InvalidArgumentError: A shape, dtype or option does not fit.
    """
    shape = shape_of(logits, "logits")
    if top_k < 1:
        raise InvalidArgumentError(f"top_k: {top_k}, expected at least 1")
    call = Call(device_of(logits), context, logits)
    context = call.context
    ids = allocate(logits, (*shape[:-1], top_k), context, "int32")
    weights = allocate(logits, (*shape[:-1], top_k), context, "float32")
    _core.route(
        context,
        logits,
        ids.target,
        weights.target,
        top_k=top_k,
        scoring=scoring,
        renormalise=renormalise,
        correction_bias=correction_bias,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=scale,
    )
    call.finish(logits)
    return ids.array(), weights.array()


def moe_align_block_size(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: Array | None = None,
    *,
    context: _core.Context | None = None,
) -> tuple[Array, Array, Array | int]:
    """Sorts the routed tokens into tiles of one expert each, on the device of the ids.

    On a GPU nothing is read by the host, so that the call can be captured in a CUDA graph: the
    lists have room for any routing, and what lies past their end is padding, the id T * top_k and
    the expert -1. Ids out of range count as -1 there.

    Args:
        topk_ids: `[T, top_k]`, int32 or int64, values -1 to num_experts - 1.
        block_size: Entries a tile: 8, 16, 32, 48 or 64.
        num_experts: 1 to 1024.
        expert_map: int32 `[num_experts]`: what each expert is called here, -1 for "not here". For
            ids on a GPU it lies there, or in host memory, whose values a captured graph keeps.
        context: Used instead of this thread's own context for the device of topk_ids.

    Returns:
        (sorted_token_ids int32, expert_ids int32, num_tokens_past_padded): as
        `ExpertStack.gemm_phase_fused` takes them, stable in order, arrays of the library of
        topk_ids. num_tokens_past_padded is an int, on a GPU an array int32 `[1]`.

    Raises:
        InvalidArgumentError: A shape, dtype or size does not fit, or an id in host memory.
    """
    shape = shape_of(topk_ids, "topk_ids")
    device = device_of(topk_ids)
    if device != "cpu":
        call = Call(device, context, topk_ids)
        context = call.context
        entries = _core.most_aligned_ids(math.prod(shape), block_size, num_experts)
        lists = [
            allocate(topk_ids, (size,), context, "int32")
            for size in (entries, entries // block_size, 1)
        ]
        _core.moe_align_block_size_into(
            context,
            topk_ids,
            *(output.target for output in lists),
            block_size=block_size,
            num_experts=num_experts,
            expert_map=expert_map,
        )
        call.finish(topk_ids)
        return lists[0].array(), lists[1].array(), lists[2].array()
    tokens, experts, count = _core.moe_align_block_size(
        topk_ids, block_size, num_experts, expert_map
    )
    return (
        same_kind(topk_ids, np.asarray(tokens)),
        same_kind(topk_ids, np.asarray(experts)),
        count,
    )
