"""The fine-tuning loop of the papers: AdamW, linear warm-up, clipping, mean squared action error."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlib.data import Windows, WindowSampler
from dtlib.errors import UserError, atomic_write
from dtlib.model import DecisionTransformer


def action_loss(predicted: Tensor, windows: Windows) -> Tensor:
    """Mean over real (not padded) steps and action dimensions of (â − a)², the papers' whole loss; predicted (B, K, A)."""
    return ((predicted - windows.actions).square().mean(-1) * windows.mask).sum() / windows.mask.sum()


def make_optimiser(model: DecisionTransformer, learning_rate: float, weight_decay: float, epsilon: float) -> torch.optim.AdamW:
    """AdamW with one group: weight decay reaches norms and biases too [code], where ε was 1e-6 for pre-trained starts."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learning, lr=learning_rate, weight_decay=weight_decay, eps=epsilon, fused=True)


def predict(model: DecisionTransformer, windows: Windows, precision: str = "float32") -> Tensor:
    """Predicted actions (B, K, A) in float32; ``precision`` "bfloat16" runs the matrix products under autocast."""
    with torch.autocast(windows.states.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        return model(windows.states, windows.actions, windows.returns_to_go, windows.time_steps).float()


def scheduled(learning_rate: float, step: int, warmup_steps: int, total_steps: int | None) -> float:
    """The learning rate of ``step``: it grows linearly over the first ``warmup_steps``, then stays; if the run's
    ``total_steps`` are given, it is multiplied by the share of them still to come."""
    left = 1 - step / total_steps if total_steps else 1.0
    return learning_rate * min((step + 1) / max(warmup_steps, 1), 1.0) * left


def train_epoch(model: DecisionTransformer, optimiser: torch.optim.Optimizer, sampler: WindowSampler, starts: Tensor, *,
                first_step: int, learning_rate: float, warmup_steps: int, gradient_clip: float | None,
                total_steps: int | None = None, precision: str = "float32",
                further_loss: Callable[[Windows, int], Tensor] | None = None,
                on_step: Callable[[], None] = lambda: None) -> float:
    """Take one optimiser step per row of ``starts`` (steps, B), the windows' flat start indices; return the mean action loss.

    The learning rate is ``scheduled``; ``first_step`` counts the steps of earlier epochs.
    gradient_clip: largest norm of the whole gradient, or None. ``further_loss`` of the windows and the step is added to the
    action loss. Dropout draws from torch's global generator.
    """
    model.train()
    total = torch.zeros((), device=starts.device)
    for i, row in enumerate(starts):
        windows = sampler.windows(row)
        loss, step = action_loss(predict(model, windows, precision), windows), first_step + i
        optimiser.zero_grad(set_to_none=True)
        if further_loss is None:
            loss.backward()
        else:
            with torch.autocast(starts.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                further = further_loss(windows, step)
            (loss + further).backward()
        if gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        optimiser.param_groups[0]["lr"] = scheduled(learning_rate, step, warmup_steps, total_steps)
        optimiser.step()
        total += loss.detach()
        on_step()
    return float(total / len(starts))


def train_together(models: list[DecisionTransformer], optimisers: list[torch.optim.Optimizer], sampler: WindowSampler,
                   starts: Tensor, *, first_step: int, learning_rate: float, warmup_steps: int, gradient_clip: float | None,
                   total_steps: int | None = None, precision: str = "float32",
                   on_step: Callable[[], None] = lambda: None) -> list[float]:
    """``train_epoch`` of R models of one architecture in one batched computation; ``starts`` (R, steps, B); their mean losses.

    For models too small to fill a GPU. The same as one after the other but for the last bits, and dropout's draws.
    """
    for model in models:
        model.train()
    parameters, _ = torch.func.stack_module_state(models)
    group = optimisers[0].param_groups[0]
    optimiser = torch.optim.AdamW(parameters.values(), weight_decay=group["weight_decay"], eps=group["eps"], fused=True)
    if states := [list(one.state.values()) for one in optimisers if one.state]:  # of earlier epochs
        for parameter, *own in zip(parameters.values(), *states, strict=True):
            optimiser.state[parameter] = {key: value.clone() if value.dim() == 0 else torch.stack([one[key] for one in own])
                                          for key, value in own[0].items()}
    total = torch.zeros(len(models), device=starts.device)

    def loss_of(own: dict[str, Tensor], windows: tuple[Tensor, ...]) -> Tensor:
        windows = Windows(*windows)
        predicted = torch.func.functional_call(models[0], own, windows[:4]).float()
        return action_loss(predicted, windows)

    for i in range(starts.shape[1]):
        windows = sampler.windows(starts[:, i].flatten())
        windows = tuple(column.unflatten(0, (len(models), -1)) for column in windows)
        # Only torch's plain attention is known to every version's vmap; for models this small it costs nothing.
        with (torch.autocast(starts.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
              sdpa_kernel(SDPBackend.MATH)):
            losses = torch.func.vmap(loss_of, randomness="different")(parameters, windows)
        optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        gradients = [parameter.grad for parameter in parameters.values()]
        if gradient_clip is not None:  # each model's by its own norm, as clip_grad_norm_ does
            norms = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()
            scale = (gradient_clip / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        optimiser.param_groups[0]["lr"] = scheduled(learning_rate, first_step + i, warmup_steps, total_steps)
        optimiser.step()
        total += losses.detach()
        on_step()
    with torch.no_grad():
        for r, (model, one) in enumerate(zip(models, optimisers, strict=True)):
            for name, own in model.named_parameters():
                stacked = parameters[name]
                own.copy_(stacked[r])
                one.state[own] = {key: (value if value.dim() == 0 else value[r]).clone()
                                  for key, value in optimiser.state[stacked].items()}
    return (total / starts.shape[1]).tolist()


@torch.no_grad()
def action_error(model: DecisionTransformer, sampler: WindowSampler, starts: Tensor, batch_size: int = 64) -> float:
    """``action_loss`` without dropout over the windows at ``starts`` (B,), weighted by their real steps."""
    model.eval()
    errors, weights = [], []
    for part in starts.split(batch_size):
        windows = sampler.windows(part)
        errors.append(action_loss(predict(model, windows), windows))
        weights.append(windows.mask.sum())
    weight = torch.stack(weights).double()
    return float((torch.stack(errors).double() * weight).sum() / weight.sum())


def choose_device(device: str) -> str:
    """"auto" is "cuda" where there is one, else "cpu". Raises UserError for a device that torch does not have here."""
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in ("auto", *available):
        raise UserError(f"Device {device!r} is not to be had: torch sees {' and '.join(available)} here. Use device='auto'; "
                        "'cuda' needs a card and a CUDA build of torch.")
    return available[-1] if device == "auto" else device


def fast_precision(device: str) -> str:
    """"bfloat16" where ``device`` multiplies it, else "float32"."""
    fast = torch.cuda.is_bf16_supported(False) if device == "cuda" else torch.cpu.get_capabilities().get("avx512_bf16")
    return "bfloat16" if fast else "float32"


def save_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: dict) -> None:
    """Write all that an interrupted training needs to go on: weights, optimiser, and ``progress`` (JSON)."""
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    tensors |= {f"{key}.{i}": value for i, state in optimiser.state_dict()["state"].items() for key, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict:
    """Take up what ``save_state`` wrote, in place; return its ``progress``."""
    with safe_open(path, framework="pt") as file:
        tensors, progress = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["progress"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments = {i: {key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")}
               for i, _ in enumerate(model.parameters()) if f"step.{i}" in tensors}  # before the first step there are none
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    return progress
