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


def window_gradients(model: DecisionTransformer, windows: Windows, dropout_seed: int | None = None) -> dict[str, Tensor]:
    """Inner products of single windows' gradients, a matrix (B, B) for each parameter, float64, on the CPU.

    Entry (i, j) is ⟨g_i, g_j⟩, where g_i is the gradient of window i's own action loss (mean over its real steps and action
    dimensions) with respect to that parameter; norms and cosines follow. ``dropout_seed``: of dropout, every window under a
    mask of its own; None: without.

    One backward pass gives the gradients of all modules' outputs; from these come the windows' gradients of one module at a
    time, (B, its parameters). All at once they would be B models: 34 GB for 100 windows of 12 blocks of width 768.
    """
    inputs, outputs = {}, {}

    def keep(module: nn.Module, given: tuple, output: Tensor) -> None:
        inputs[module], outputs[module] = given[0].detach(), output

    names = {module: name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    with (torch.random.fork_rng([windows.states.device] if windows.states.is_cuda else []), torch.enable_grad(),
          _hooked(model, dict.fromkeys(names, keep), training=dropout_seed is not None)):
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        predicted = model(windows.states, windows.actions, windows.returns_to_go, windows.time_steps)
        errors = (predicted - windows.actions).square().mean(-1) * windows.mask
        loss = (errors.sum(1) / windows.mask.sum(1)).sum()  # of no window does another's loss depend
        *gradients, of_predicted = torch.autograd.grad(loss, [*outputs.values(), predicted])
    # The action head is the transposed action embedding: â = tanh(W_aᵀ h).
    head = torch.einsum("bkd,bka->bda", outputs[model.ln_f].detach(), of_predicted * (1 - predicted.detach().square()))
    grams = {}
    for module, gradient in zip(outputs, gradients, strict=True):
        def of_window(given: Tensor, gradient: Tensor, module: nn.Module = module) -> dict[str, Tensor]:
            parameters = dict(module.named_parameters(recurse=False))
            return torch.func.vjp(lambda p: torch.func.functional_call(module, p, (given,)), parameters)[1](gradient)[0]

        for name, own in torch.func.vmap(of_window)(inputs[module], gradient).items():
            own = own + head if module is model.embed_action and name == "weight" else own
            rows = own.detach().flatten(1)
            grams[f"{names[module]}.{name}"] = (rows @ rows.T).double().cpu()
    return grams
