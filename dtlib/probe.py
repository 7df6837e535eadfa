"""What happens inside a Decision Transformer on given windows. A model is left as it was found."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from dtlib.data import Windows, WindowSampler
from dtlib.errors import UserError
from dtlib.model import DecisionTransformer
from dtlib.train import action_loss

# A block's outputs in the order of computation; "stream" is the residual stream after the block.
# Paper A lists nine. Without dropout, its attn.resid_dropout and mlp.dropout equal the c_proj's.
LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2")
LAYERS += ("mlp.c_fc", "mlp.act", "mlp.c_proj", "stream")
STATE = -2  # the last step's state token, of T = 3K


def draw_windows(sampler: WindowSampler, number: int, seed: int = 0) -> Windows:
    """Draw windows that need no padding, the same for every model. UserError if there are none."""
    whole = sampler.whole_windows()
    if not len(whole):
        raise UserError("No episode is as long as the context: take a shorter context.")
    drawn = torch.randint(len(whole), (number,), generator=torch.Generator().manual_seed(seed))
    return sampler.windows(whole[drawn.to(whole.device)])


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: list[tuple], training: bool = False) -> Iterator[None]:
    """Call each (module, hook) after its module, with dropout if ``training``; then undo that."""
    was_training = model.training
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield model.train(training)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(
    model: DecisionTransformer, windows: Windows, select: Callable = lambda a: a, layers=LAYERS
) -> dict[str, Tensor]:
    """Return outputs (B, 3K, D'), without dropout: the "tokens", and "h.{block}.{layer}".

    D' is D, 3D (attn.c_attn) or 4D (mlp.c_fc, mlp.act). Only what ``select`` takes of each output
    is kept, such as the last state token's: ``lambda a: a[:, STATE]``.
    """
    kept = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        kept[name] = select(inputs[0] if name.endswith(".stream") else output).clone()

    norms = [*(block.ln_1 for block in model.h), model.ln_f]  # each is given the stream before it
    hooks = []
    for i, block in enumerate(model.h):
        for layer in layers:
            module = norms[i + 1] if layer == "stream" else block.get_submodule(layer)
            hooks.append((module, partial(keep, f"h.{i}.{layer}")))
    with _hooked(model, hooks):
        tokens = model.embed(*windows[:4])
        model.hidden(tokens)
    return {"tokens": select(tokens).clone(), **kept}


@torch.no_grad()
def attention(model: DecisionTransformer, windows: Windows) -> list[Tensor]:
    """Each block's weights (B, H, T, T), T = 3K: row i is what token i takes of each j ≤ i."""
    weights, projected = [], activations(model, windows, layers=["attn.c_attn"])
    for i, block in enumerate(model.h):
        split = projected[f"h.{i}.attn.c_attn"].unflatten(-1, (3, block.attn.num_heads, -1))
        query, key, _ = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    return weights


def window_gradients(
    model: DecisionTransformer, windows: Windows, dropout_seed: int | None = None
) -> dict[str, Tensor]:
    """Return inner products of single windows' gradients: (B, B) float64 on the CPU a parameter.

    Entry (i, j) is ⟨g_i, g_j⟩, where g_i is the gradient of window i's own action loss with respect
    to that parameter. ``dropout_seed``: every window has a dropout mask of its own; None: none.
    They are in memory for one module at a time: all are 34 GB for 100 windows of 12 blocks of width
    768.
    """
    inputs, outputs = {}, {}

    def keep(module: nn.Module, given: tuple, output: Tensor) -> None:
        inputs[module], outputs[module] = given[0].detach(), output

    names = {module: name for name, module in model.named_modules() if [*module.parameters(False)]}
    hooks, training = [(module, keep) for module in names], dropout_seed is not None
    cards = [windows.states.device] if windows.states.is_cuda else []
    with torch.random.fork_rng(cards), torch.enable_grad(), _hooked(model, hooks, training):
        if training:
            torch.manual_seed(dropout_seed)
        predicted = model(*windows[:4])
        loss = torch.func.vmap(action_loss)(predicted, windows).sum()  # each is its window's alone
        *gradients, of_predicted = torch.autograd.grad(loss, [*outputs.values(), predicted])
    grams = {}
    for module, gradient in zip(outputs, gradients, strict=True):
        of_windows = torch.func.vmap(partial(_of_window, module))(inputs[module], gradient)
        if module is model.embed_action and model.head is None:
            # The action head is the transposed action embedding: â = tanh(W_aᵀ h).
            hidden, slope = outputs[model.ln_f].detach(), 1 - predicted.detach().square()
            of_head = torch.einsum("bkd,bka->bda", hidden, of_predicted * slope)
            of_windows["weight"] = of_windows["weight"] + of_head
        for name, own in of_windows.items():
            rows = own.detach().flatten(1)
            grams[f"{names[module]}.{name}"] = (rows @ rows.T).double().cpu()
    return grams


def _of_window(module: nn.Module, given: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Gradients of a module's parameters, from one window's input and its output's gradient."""
    own = dict(module.named_parameters(recurse=False))
    backward = torch.func.vjp(lambda p: torch.func.functional_call(module, p, (given,)), own)[1]
    return backward(gradient)[0]
