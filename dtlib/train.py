"""The fine-tuning loop of the papers: AdamW, linear warm-up, clipping, mean squared action error."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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


def train_epoch(model: DecisionTransformer, optimiser: torch.optim.Optimizer, sampler: WindowSampler, starts: Tensor, *,
                first_step: int, learning_rate: float, warmup_steps: int, gradient_clip: float | None,
                total_steps: int | None = None, precision: str = "float32",
                further_loss: Callable[[Windows, int], Tensor] | None = None,
                on_step: Callable[[], None] = lambda: None) -> float:
    """Take one optimiser step per row of ``starts`` (steps, B), the windows' flat start indices; return the mean action loss.

    The learning rate grows linearly over the run's first ``warmup_steps``, then stays; if the run's ``total_steps`` are
    given, it is multiplied by the share of them still to come. ``first_step`` counts the steps of earlier epochs.
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
        left = 1 - step / total_steps if total_steps else 1.0
        optimiser.param_groups[0]["lr"] = learning_rate * min((step + 1) / max(warmup_steps, 1), 1.0) * left
        optimiser.step()
        total += loss.detach()
        on_step()
    return float(total / len(starts))


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
