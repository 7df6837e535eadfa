"""Return-conditioned rollouts, many episodes in lockstep."""

from typing import NamedTuple

import numpy as np
import torch

from dtlib.model import DecisionTransformer
from dtlib.physics import Environments
from dtlib.seeding import stream_seed
from dtlib.tasks import Task


class Episodes(NamedTuple):
    """``returns`` (E,) float64: undiscounted sums of rewards; ``lengths`` (E,) int64: environment steps."""

    returns: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def rollout(model: DecisionTransformer, task: Task, state_mean: np.ndarray, state_std: np.ndarray, *, target_return: float,
            episodes: int, context: int, seed: int, first_episode: int = 0, horizon: int | None = None,
            delayed: bool = False) -> Episodes:
    """Let the model act in ``episodes`` episodes at once, each asked for ``target_return`` (papers A and B, evaluation).

    R̂ starts at target/scale and falls by reward/scale (``delayed``: not before the episode's end); the model sees the last
    ``context`` steps, and its action is executed. Episode e starts from the stream (seed, "evaluation", first_episode + e),
    whatever runs beside it; the model's batched arithmetic may differ from that for one episode in the last bits.
    state_mean, state_std: (S,).
    """
    model.eval()
    device, dtype = model.embed_state.weight.device, model.embed_state.weight.dtype
    horizon = horizon or task.horizon
    environments = Environments(task, [stream_seed(seed, "evaluation", first_episode + e) % 2**31 for e in range(episodes)],
                                torch.get_num_threads())
    mean, std, observed = state_mean.astype(np.float64), state_std.astype(np.float64), environments.observations
    states = torch.zeros(episodes, horizon, task.state_dim, device=device, dtype=dtype)
    actions = torch.zeros(episodes, horizon, task.action_dim, device=device, dtype=dtype)
    returns_to_go = torch.zeros(episodes, horizon, device=device, dtype=dtype)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    alive = np.arange(episodes)
    for t in range(horizon):
        rows = torch.as_tensor(alive, device=device)
        states[rows, t] = torch.as_tensor((observed - mean) / std, device=device, dtype=dtype)
        still_to_come = (target_return - returns[alive] * (not delayed)) / task.return_scale
        returns_to_go[rows, t] = torch.as_tensor(still_to_come, device=device, dtype=dtype)
        seen = slice(max(0, t + 1 - context), t + 1)
        time_steps = torch.arange(seen.start, seen.stop, device=device).expand(len(alive), -1)
        chosen = model.act(states[rows, seen], actions[rows, seen], returns_to_go[rows, seen], time_steps)
        actions[rows, t] = chosen
        observed, rewards, ends = environments.step(alive, chosen.double().cpu().numpy())
        returns[alive] += rewards
        lengths[alive] = t + 1
        alive, observed = alive[~ends], observed[~ends]
        if not len(alive):
            break
    return Episodes(returns, lengths)
