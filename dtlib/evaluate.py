"""Return-conditioned rollouts, many episodes in lockstep, in gymnasium's own environments."""

from typing import NamedTuple

import gymnasium
import numpy as np
import torch

from dtlib.model import DecisionTransformer
from dtlib.seeding import stream_seed
from dtlib.tasks import Task


class Episodes(NamedTuple):
    """returns (E,) float64 undiscounted sums of rewards; lengths (E,) int64 in environment steps."""

    returns: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def rollout(model: DecisionTransformer, task: Task, state_mean: np.ndarray, state_std: np.ndarray, *, target_return: float,
            episodes: int, context: int, seed: int, first_episode: int = 0, horizon: int | None = None) -> Episodes:
    """Let the model act in ``episodes`` episodes at once, each asked for ``target_return`` (papers A and B, evaluation).

    Start at R̂ = target/scale, subtract reward/scale each step, show the model the last ``context`` steps, execute its
    action (clipped to the environment's range by the environment's own actuators). Episode e resets from the stream
    (seed, "evaluation", first_episode + e), so its start does not depend on how many others run beside it; the model's
    batched arithmetic may differ from the single one's in the last bits. state_mean, state_std: (S,).
    """
    model.eval()
    device, dtype = model.embed_state.weight.device, model.embed_state.weight.dtype
    horizon = horizon or task.horizon
    environments = [task.make_environment() for _ in range(episodes)]
    mean, std = state_mean.astype(np.float64), state_std.astype(np.float64)
    observed = np.stack([env.reset(seed=stream_seed(seed, "evaluation", first_episode + e) % 2**31)[0]
                         for e, env in enumerate(environments)])
    states = torch.zeros(episodes, horizon, task.state_dim, device=device, dtype=dtype)
    actions = torch.zeros(episodes, horizon, task.action_dim, device=device, dtype=dtype)
    returns_to_go = torch.zeros(episodes, horizon, device=device, dtype=dtype)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    alive = np.arange(episodes)
    for t in range(horizon):
        rows = torch.as_tensor(alive, device=device)
        states[rows, t] = torch.as_tensor((observed[alive] - mean) / std, device=device, dtype=dtype)
        returns_to_go[rows, t] = torch.as_tensor((target_return - returns[alive]) / task.return_scale, device=device, dtype=dtype)
        seen = slice(max(0, t + 1 - context), t + 1)
        time_steps = torch.arange(seen.start, seen.stop, device=device).expand(len(alive), -1)
        chosen = model(states[rows, seen], actions[rows, seen], returns_to_go[rows, seen], time_steps)[:, -1]
        actions[rows, t] = chosen
        still = []
        for e, action in zip(alive, chosen.double().cpu().numpy(), strict=True):
            observed[e], reward, terminated, _, _ = environments[e].step(action)
            returns[e] += reward
            lengths[e] = t + 1
            if not terminated:
                still.append(e)
        alive = np.array(still, dtype=np.int64)
        if not len(alive):
            break
    for env in environments:
        env.close()
    return Episodes(returns, lengths)


def frame_strip(task: Task, states: np.ndarray, *, height: int = 160, width: int = 160) -> np.ndarray:
    """Draw states (F, S) of the three locomotion tasks off-screen → (F, height, width, 3) uint8.

    Their observations are the generalised positions but the horizontal one, then the velocities, so a frame needs no
    replay; the horizontal position, which no data set stores, is 0. Raises whatever MuJoCo's renderer raises where
    off-screen rendering does not work (set MUJOCO_GL=egl on a machine without a display).
    """
    env = task.make_environment(render_mode="rgb_array", height=height, width=width)
    try:
        env.reset(seed=0)
        model = env.unwrapped.model
        frames = []
        for state in states.astype(np.float64):
            env.unwrapped.set_state(np.concatenate([[0.0], state[:model.nq - 1]]), state[model.nq - 1:])
            frames.append(env.render())
        return np.stack(frames)
    finally:
        env.close()
