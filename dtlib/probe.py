"""What happens inside a Decision Transformer on given windows; a model is left as it was found."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dtlib.data import Windows, WindowSampler
from dtlib.errors import UserError
from dtlib.model import DecisionTransformer
from dtlib.train import action_loss

# A block's outputs in the order of computation; "stream": the residual stream after it. Paper A's list has nine layers, but
# without dropout its attn.resid_dropout equals attn.c_proj, and its mlp.dropout mlp.c_proj.
LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "stream")
STATE = -2  # the last step's state token, of T = 3K


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
def _hooked(model: nn.Module, hooks: list[tuple[nn.Module, Callable]], training: bool = False) -> Iterator[None]:
    """Call each hook(module, inputs, output) after its module, with dropout if ``training``; then all is as before."""
    was_training = model.training
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
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
                select: Callable[[Tensor], Tensor] = lambda activation: activation,
                layers: Sequence[str] = LAYERS) -> dict[str, Tensor]:
    """``select`` of each output (B, T, D'): of the embedded "tokens", and of a block's ``layers`` as "h.{block}.{layer}".

    Without dropout, for all T = 3K tokens; D' is D, 3D (attn.c_attn) or 4D (mlp.c_fc and mlp.act). ``select`` keeps what is
    needed while the rest is freed, such as the last state token's: ``lambda a: a[:, STATE]``.
    """
    kept = {}

    def keeper(name: str, of_input: bool) -> Callable:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            kept[name] = select(inputs[0] if of_input else output).clone()

        return keep

    norms = [*(block.ln_1 for block in model.h), model.ln_f]  # what the next one is given is the stream after a block
    hooks = {f"h.{i}.{layer}": norms[i + 1] if layer == "stream" else block.get_submodule(layer)
             for i, block in enumerate(model.h) for layer in layers}
    with _hooked(model, [(module, keeper(name, name.endswith(".stream"))) for name, module in hooks.items()]):
        tokens = _tokens(model, windows)
        model.hidden(tokens)
    return {"tokens": select(tokens).clone(), **{name: kept[name] for name in hooks}}


@torch.no_grad()
def attention(model: DecisionTransformer, windows: Windows) -> list[Tensor]:
    """Each block's own attention weights (B, H, T, T), T = 3K: row i, what token i takes of each token j ≤ i, sums to 1."""
    weights, projected = [], activations(model, windows, layers=["attn.c_attn"])
    for i, block in enumerate(model.h):
        query, key, _ = projected[f"h.{i}.attn.c_attn"].unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
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
          _hooked(model, [(module, keep) for module in names], training=dropout_seed is not None)):
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        predicted = model(windows.states, windows.actions, windows.returns_to_go, windows.time_steps)
        loss = torch.func.vmap(action_loss)(predicted, windows).sum()  # on no window does another's loss depend
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
