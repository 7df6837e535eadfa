"""The training loop of the papers: AdamW, linear warm-up, clipping, mean squared action error."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtlib.data import Windows, WindowSampler
from dtlib.errors import UserError
from dtlib.model import DecisionTransformer

WEIGHT_DECAY = 1e-4  # of all parameters, norms and biases too [code]
EPSILON = 1e-8  # AdamW's; [code] has 1e-6 for pre-trained starts


def action_loss(predicted: Tensor, windows: Windows) -> Tensor:
    """Return the papers' whole loss: the mean of (â − a)² over real steps and action dimensions.

    predicted (B, K, A). Padded steps do not count.
    """
    error = (predicted - windows.actions).square().mean(-1)  # (B, K)
    return (error * windows.mask).sum() / windows.mask.sum()


def make_optimiser(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW over all parameters that require a gradient."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        learning, lr=learning_rate, weight_decay=WEIGHT_DECAY, eps=EPSILON, fused=True
    )


def predict(model: DecisionTransformer, windows: Windows, precision: str = "float32") -> Tensor:
    """Return predicted actions (B, K, A) in float32; "bfloat16" multiplies in bfloat16."""
    device = windows.states.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        actions = model(windows.states, windows.actions, windows.returns_to_go, windows.time_steps)
    return actions.float()


def learning_rate_at(
    step: int, peak: float, warmup_steps: float, total_steps: int, shape: str = "constant"
) -> float:
    """Return the learning rate of ``step`` (from 0) after a linear warm-up to ``peak``.

    ``shape`` is what follows: "constant" (papers A and B); "decay", multiplied by the share of
    steps left; "cosine", not below a tenth (games).
    """
    warm = (step + 1) / max(warmup_steps, 1)
    if shape == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * step / total_steps))
        return peak * min(warm, max(0.1, falling))
    left = 1 - step / total_steps if shape == "decay" else 1.0
    return peak * min(warm, 1.0) * left


def clip_gradient(model: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradient down to the norm ``largest`` (None: leave it); return its norm before."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def refuse_divergence(
    model: nn.Module, losses: list[Tensor], norms: list[Tensor], first_step: int, rate: Callable
) -> None:
    """Raise UserError if a step's loss, gradient or, after the last one, a weight is not finite."""
    finite = torch.stack(losses).isfinite() & torch.stack(norms).isfinite()
    weights = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if finite.all() and weights:
        return
    i = len(losses) - 1 if finite.all() else int((~finite).int().argmax())
    raise UserError(
        f"The training diverged at step {first_step + i + 1}: the loss was {float(losses[i]):.3g}, "
        f"the gradient's norm {float(norms[i]):.3g}, the learning rate {rate(first_step + i):.3g}. "
        "Nothing is kept as a finished run; take a lower learning_rate or a smaller gradient_clip."
    )


def train_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    sampler: WindowSampler,
    first_rows: Tensor,
    *,
    rate: Callable[[int], float],
    first_step: int = 0,
    gradient_clip: float | None = None,
    precision: str = "float32",
    loss_of: Callable[[Tensor, Windows], Tensor] = action_loss,
    further_loss: Callable[[Windows, int], Tensor] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Take one training step per line of ``first_rows`` (steps, B): where its windows begin.

    Returns the mean of ``loss_of(predictions, windows)``; ``further_loss(windows, step)`` is added
    to it for training. ``rate`` gives the learning rate of a step; ``first_step`` is the number of
    steps taken before. A gradient longer than ``gradient_clip`` is scaled down to it. Dropout draws
    from torch's global generator. Raises UserError for a training that diverges.
    """
    model.train()
    device, losses, norms = first_rows.device.type, [], []
    total = torch.zeros((), device=first_rows.device)
    for step, rows in enumerate(first_rows, first_step):
        windows = sampler.windows(rows)
        loss = loss_of(predict(model, windows, precision), windows)
        losses.append(loss.detach())
        total += losses[-1]
        if further_loss is not None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                further = further_loss(windows, step)
            loss = loss + further
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(clip_gradient(model, gradient_clip))
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        optimiser.step()
        on_step()
    refuse_divergence(model, losses, norms, first_step, rate)
    return float(total / len(first_rows))


@torch.no_grad()
def action_error(
    model: DecisionTransformer, sampler: WindowSampler, first_rows: Tensor, batch_size: int = 64
) -> float:
    """Return ``action_loss`` without dropout over the windows that begin at ``first_rows`` (B,)."""
    model.eval()
    errors, weights = [], []
    for part in first_rows.split(batch_size):
        windows = sampler.windows(part)
        errors.append(action_loss(predict(model, windows), windows))
        weights.append(windows.mask.sum())
    weight = torch.stack(weights).double()
    return float((torch.stack(errors).double() * weight).sum() / weight.sum())
