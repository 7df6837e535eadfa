"""Dropout that costs little on a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import dropout


def add_dropped(residual: Tensor | None, branch: Tensor, probability: float) -> Tensor:
    """Return ``residual`` (or 0) plus dropout of ``branch``, in training.

    On a CPU, torch's dropout takes a quarter of a training step: it draws one random number an
    element. Here 64 random bits serve four elements; the probability is exact to 2⁻¹⁶.
    """
    if not probability or branch.is_cuda:
        branch = dropout(branch, probability) if probability else branch
        return branch if residual is None else residual + branch
    numbers = torch.empty(-(-branch.numel() // 4), dtype=torch.int64)
    bits = numbers.random_(-(2**63), None).view(torch.int16)[: branch.numel()]
    threshold = round(probability * 2**16)
    kept = (bits >= threshold - 2**15).view(branch.shape).to(branch.dtype)
    kept *= 2**16 / (2**16 - threshold)
    return branch * kept if residual is None else torch.addcmul(residual, branch, kept)
