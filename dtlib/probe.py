"""What happens inside a Decision Transformer on given windows; a model is left as it was found."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dtlib.data import Windows, WindowSampler
from dtlib.errors import UserError
from dtlib.model import DecisionTransformer

# A block's outputs in the order of computation; "stream": the residual stream after it. Paper A's list has nine layers, but
# without dropout its attn.resid_dropout equals attn.c_proj, and its mlp.dropout mlp.c_proj.
LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "stream")
RETURN, STATE, ACTION = KINDS = -3, -2, -1  # the last step's tokens, of T = 3K
KIND_NAMES = dict(zip(KINDS, ("return", "state", "action"), strict=True))


def draw_windows(sampler: WindowSampler, number: int, seed: int = 0) -> Windows:
    """``number`` windows without padding, uniformly from all such, the same for every model with this sampler's data.

    Raises UserError if no episode is as long as a window.
    """
    whole = sampler.whole_starts()
    if not len(whole):
        raise UserError("No episode is as long as the context: choose a smaller context or another data set.")
    drawn = torch.randint(len(whole), (number,), generator=torch.Generator().manual_seed(seed))
    return sampler.windows(whole[drawn.to(whole.device)])


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: dict[nn.Module, Callable], training: bool = False) -> Iterator[None]:
    """Call hooks(module, inputs, output) after these modules, with dropout if ``training``; then all is as before."""
    was_training = model.training
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield model.train(training)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _tokens(model: DecisionTransformer, windows: Windows) -> Tensor:
    return model.embed(windows.states, windows.actions, windows.returns_to_go, windows.time_steps)


@torch.no_grad()
def activations(model: DecisionTransformer, windows: Windows,
                select: Callable[[Tensor], Tensor] = lambda activation: activation) -> dict[str, Tensor]:
    """``select`` of each output (B, T, D'): of the embedded "tokens", and of all LAYERS of a block as "h.{block}.{layer}".

    Without dropout, for all T = 3K tokens; D' is D, 3D (attn.c_attn) or 4D (mlp.c_fc and mlp.act). ``select`` keeps what is
    needed while the rest is freed, such as the last state token's: ``lambda a: a[:, STATE]``.
    """
    kept, hooks = {}, {}
    for i, block in enumerate(model.h):
        def keep(module: nn.Module, inputs: tuple, output: Tensor, name: str) -> None:
            kept[name] = select(output).clone()

        def keep_both(module: nn.Module, inputs: tuple, output: Tensor, i: int = i, act: nn.Module = block.mlp.act) -> None:
            keep(module, inputs, output, f"h.{i}.mlp.c_fc")
            keep(module, inputs, act(output), f"h.{i}.mlp.act")  # the forward pass may fuse it

        def keep_both_norms(module: nn.Module, inputs: tuple, output: Tensor, i: int = i) -> None:
            if i > 0:
                keep(module, (), inputs[0], f"h.{i - 1}.stream")  # what a norm is given is what the last block left
            if i < len(model.h):
                keep(module, (), output, f"h.{i}.ln_1")

        hooks |= {block.get_submodule(layer): functools.partial(keep, name=f"h.{i}.{layer}")
                  for layer in ("attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_proj")}
        hooks |= {block.mlp.c_fc: keep_both, block.ln_1: keep_both_norms}
    hooks[model.ln_f] = functools.partial(keep_both_norms, i=len(model.h))
    with _hooked(model, hooks):
        tokens = _tokens(model, windows)
        kept["tokens"] = select(tokens).clone()
        model.hidden(tokens)
    return {name: kept[name] for name in ("tokens", *(f"h.{i}.{layer}" for i in range(len(model.h)) for layer in LAYERS))}


@torch.no_grad()
def attention(model: DecisionTransformer, windows: Windows) -> list[Tensor]:
    """Each block's own attention weights (B, H, T, T), T = 3K: row i, what token i takes of each token j ≤ i, sums to 1."""
    weights = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor, heads: int) -> None:
        query, key, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))

    with _hooked(model, {b.attn.c_attn: functools.partial(keep, heads=b.attn.num_heads) for b in model.h}):
        model.hidden(_tokens(model, windows))
    return weights
