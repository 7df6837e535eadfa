"""Changes to a starting point that tell causes apart: a block, heads, scrambled weights."""

import torch
from torch import Tensor, nn

from dtlib.errors import UserError
from dtlib.model import DecisionTransformer


def swap_block(model: DecisionTransformer, donor: DecisionTransformer, block: int) -> None:
    """Put a block of ``donor`` into ``model``, with its own heads and activation (A, 5.6.1 [code]).

    Raises UserError if there is no such block, or if it has another width or architecture.
    """
    blocks = min(len(model.h), len(donor.h))
    if block not in range(blocks):
        raise UserError(f"There is no block {block} to swap: choose one from 0 to {blocks - 1}.")
    ours, theirs = ((m.config.model_type, m.config.hidden_size) for m in (model, donor))
    if ours != theirs:
        what = "A block of {}, width {}, does not fit into {}, width {}".format(*theirs, *ours)
        raise UserError(f"{what}: choose a donor of the same size and architecture.")
    model.h[block] = donor.h[block]


def draw_heads_anew(model: DecisionTransformer, heads: tuple[int, ...]) -> None:
    """Draw some heads of block 0 anew, as GPT-2 starts them (Zhao et al. 2025), in place."""
    if not heads:
        return
    attention, std = model.h[0].attn, model.config.initializer_range
    if wrong := [head for head in heads if head not in range(attention.num_heads)]:
        last = attention.num_heads - 1
        raise UserError(f"There is no head {wrong[0]} to reset: block 0 has heads 0 to {last}.")
    by_head = (3, attention.num_heads, -1)
    with torch.no_grad():
        for head in heads:
            attention.c_attn.weight.unflatten(1, by_head)[:, :, head].normal_(std=std)
            attention.c_attn.bias.unflatten(0, by_head)[:, head].zero_()
            output = attention.c_proj.weight.unflatten(0, by_head[1:])[head]
            output.normal_(std=std / (2 * len(model.h)) ** 0.5)


def scrambled(tensor: Tensor, how: str) -> Tensor:
    """Return a tensor that keeps the scale of ``tensor`` and nothing that was learnt.

    "shuffled": the same entries in random order. "rotated": a matrix with the same singular values
    between random orthogonal matrices; a vector is shuffled.
    """
    if how == "shuffled" or tensor.dim() == 1:
        return tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    rows, columns = (nn.init.orthogonal_(torch.empty(n, n)) for n in tensor.shape)
    return (rows @ tensor.float() @ columns).to(tensor.dtype)
