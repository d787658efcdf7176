"""Choosing experts and sorting tokens into tiles, as their descriptions read, in float64."""

import numpy as np
from gptq_writer import Array


def reference_route(
    logits: Array,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = True,
    correction_bias: Array | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """DeepSeek's choice as its published code makes it; with one group, everybody's."""
    wide = logits.astype(np.float64)
    if scoring == "softmax":
        scores = np.exp(wide - wide.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-wide))
    choice = scores if correction_bias is None else scores + correction_bias
    if top_groups < num_groups:
        grouped = choice.reshape(len(choice), num_groups, -1)
        ordered = np.sort(grouped, -1)
        worth = ordered[..., -1] if correction_bias is None else ordered[..., -2:].sum(-1)
        best = np.argsort(-worth, -1, kind="stable")[:, :top_groups]
        allowed = np.zeros(worth.shape, bool)
        np.put_along_axis(allowed, best, True, -1)
        choice = np.where(np.repeat(allowed, grouped.shape[-1], -1), choice, -np.inf)
    ids = np.argsort(-choice, -1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, weights * scale


def reference_align(
    ids: Array, block_size: int, experts: int, expert_map: Array | None = None
) -> tuple[Array, Array]:
    """Tokens and experts of the tiles, up to the end of what counts; -1 comes last."""
    flat = ids.reshape(-1)
    tokens = [np.zeros(0, np.int64)]
    tiles = []
    for expert in [*range(experts), -1]:
        members = np.flatnonzero(flat == expert)
        count = -(-len(members) // block_size)
        tokens.append(np.full(count * block_size, flat.size))
        tokens[-1][: len(members)] = members
        tiles += [expert if expert < 0 or expert_map is None else expert_map[expert]] * count
    return np.concatenate(tokens), np.array(tiles, np.int64)
