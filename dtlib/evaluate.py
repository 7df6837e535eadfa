"""Return-conditioned rollouts of many episodes at once."""

from typing import NamedTuple

import numpy as np
import torch

from dtlib.model import DecisionTransformer
from dtlib.physics import Environments
from dtlib.seeding import stream_seed
from dtlib.tasks import Task


class Episodes(NamedTuple):
    """``returns`` (E,) float64 are undiscounted; ``lengths`` (E,) int64 are environment steps."""

    returns: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def rollout(
    model: DecisionTransformer,
    task: Task,
    state_mean: np.ndarray,
    state_std: np.ndarray,
    *,
    target_return: float,
    episodes: int,
    context: int,
    seed: int,
    horizon: int | None = None,
    delayed: bool = False,
) -> Episodes:
    """Let the model act in ``episodes`` episodes, and ask for ``target_return`` in each.

    The return-to-go starts at target/scale and falls by reward/scale after each step (not at all if
    rewards are ``delayed``). The model sees the last ``context`` steps. state_mean and state_std
    (S,) standardise the states. Episode e has the stream (seed, "evaluation", e), so it is the same
    whichever episodes run beside it. ``horizon``: None is the task's.
    """
    model.eval()
    weight = model.embed_state.weight
    like, horizon = {"device": weight.device, "dtype": weight.dtype}, horizon or task.horizon
    seeds = [stream_seed(seed, "evaluation", number) % 2**31 for number in range(episodes)]
    environments = Environments(task, seeds, torch.get_num_threads())
    mean, std = state_mean.astype(np.float64), state_std.astype(np.float64)
    states = torch.zeros(episodes, horizon, task.state_dim, **like)
    actions = torch.zeros(episodes, horizon, task.action_dim, **like)
    returns_to_go = torch.zeros(episodes, horizon, **like)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    alive, observed = np.arange(episodes), environments.observations
    for t in range(horizon):
        rows = torch.as_tensor(alive, device=weight.device)
        states[rows, t] = torch.as_tensor((observed - mean) / std, **like)
        still_to_come = (target_return - returns[alive] * (not delayed)) / task.return_scale
        returns_to_go[rows, t] = torch.as_tensor(still_to_come, **like)
        seen = slice(max(0, t + 1 - context), t + 1)
        time_steps = torch.arange(seen.start, seen.stop, device=weight.device)
        # Step t's own action is still zero: the model does not see it.
        window = [column[rows, seen] for column in (states, actions, returns_to_go)]
        chosen = model.act(*window, time_steps.expand(len(alive), -1))
        actions[rows, t] = chosen
        observed, rewards, ends = environments.step(alive, chosen.double().cpu().numpy())
        returns[alive] += rewards
        lengths[alive] = t + 1
        alive, observed = alive[~ends], observed[~ends]
        if not len(alive):
            break
    return Episodes(returns, lengths)
