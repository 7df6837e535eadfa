"""The fine-tuning loop of the papers: AdamW, linear warm-up, clipping, mean squared action error."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtlib.data import Windows, WindowSampler
from dtlib.model import DecisionTransformer


def action_loss(predicted: Tensor, windows: Windows) -> Tensor:
    """Mean over real (not padded) steps and action dimensions of (â − a)², the papers' whole loss; predicted (B, K, A)."""
    return ((predicted - windows.actions).square().mean(-1) * windows.mask).sum() / windows.mask.sum()


def make_optimiser(model: DecisionTransformer, learning_rate: float, weight_decay: float, epsilon: float) -> torch.optim.AdamW:
    """AdamW with one group: weight decay reaches norms and biases too [code], where ε was 1e-6 for pre-trained starts."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, eps=epsilon, fused=True)


def predict(model: DecisionTransformer, windows: Windows, precision: str = "float32") -> Tensor:
    """Predicted actions (B, K, A) in float32; ``precision`` "bfloat16" runs the matrix products under autocast."""
    with torch.autocast(windows.states.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        return model(windows.states, windows.actions, windows.returns_to_go, windows.time_steps).float()


def train_epoch(model: DecisionTransformer, optimiser: torch.optim.Optimizer, sampler: WindowSampler, starts: Tensor, *,
                first_step: int, learning_rate: float, warmup_steps: int, gradient_clip: float | None,
                precision: str = "float32", on_step: Callable[[], None] = lambda: None) -> float:
    """Take one optimiser step per row of ``starts`` (steps, B), the windows' flat start indices; return the mean loss.

    The learning rate grows linearly over the run's first ``warmup_steps``, then stays; ``first_step`` counts the steps of
    earlier epochs. gradient_clip: largest norm of the whole gradient, or None. Dropout draws from torch's global generator.
    """
    model.train()
    total = torch.zeros((), device=starts.device)
    for i, row in enumerate(starts):
        windows = sampler.windows(row)
        loss = action_loss(predict(model, windows, precision), windows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((first_step + i + 1) / max(warmup_steps, 1), 1.0)
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
