"""Attention distance (paper A, 5.6.2): how far back a token looks, in tokens; and how much it looks at itself."""

import torch
from torch import Tensor


def _offsets(like: Tensor) -> Tensor:
    """|i − j| of query i and key j, (T, T)."""
    index = torch.arange(like.shape[-2], device=like.device, dtype=like.dtype)
    return (index[:, None] - index).abs()


def distances_as_released(query: Tensor, key: Tensor) -> Tensor:
    """Each window's distance (B,) in a block, from its query and key (B, T, D) before they are split into heads [code].

    Four things differ from the formula: the softmax is over all keys, and what falls on the future is dropped afterwards, so
    a row sums to less than 1; the D dimensions are one head, whatever the model has; so the scale is √D; and the mean is over
    all T² entries in the place of the T queries, which divides by another T.
    """
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    attention = scores.softmax(-1).tril()
    return (attention * _offsets(attention)).mean((-2, -1))


def distances(attention: Tensor) -> Tensor:
    """Mean over queries i of Σ_j A_ij·|i − j|, (B, H), in tokens, of a model's own weights A (B, H, T, T)."""
    return (attention * _offsets(attention)).sum(-1).mean(-1)


def uniform_distance(tokens: int) -> float:
    """``distances`` of causal attention that spreads evenly: query i, from 0, is i/2 tokens from its i + 1 keys."""
    return (tokens - 1) / 4


def uniform_distance_as_released(tokens: int) -> float:
    """``distances_as_released`` of equal scores: Σ_i i(i + 1)/2 / T, over T² entries."""
    return (tokens ** 2 - 1) / (6 * tokens ** 2)


def change(before: Tensor, after: Tensor) -> Tensor:
    """Mean over windows of |d(after) − d(before)|: (B, ...) and (B, ...) → (...), as in Figure 10 a number per window."""
    return (after - before).abs().mean(0)


def weight_on_itself(attention: Tensor) -> Tensor:
    """Mean over queries of A_ii, what a token takes of itself: (B, H, T, T) → (B, H). Near 1: a head without memory."""
    return attention.diagonal(dim1=-2, dim2=-1).mean(-1)


def uniform_weight_on_itself(tokens: int) -> float:
    """``weight_on_itself`` of causal attention that spreads evenly: the mean of 1/(i + 1)."""
    return sum(1 / (i + 1) for i in range(tokens)) / tokens
