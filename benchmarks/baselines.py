"""A Decision Transformer trained and evaluated the plain way, to measure the fast path against.

It does what the papers' released code does, step by step, over transformers' own
``DecisionTransformerModel``: windows are cut one by one and padded on the left, the loss is read
every step, and one episode at a time is played in gymnasium.
"""

import time

import numpy as np
import torch
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from dtlib.data import Trajectories
from dtlib.tasks import Task


def make_model(
    task: Task, blocks: int, width: int, heads: int, attention: str
) -> DecisionTransformerModel:
    """Return transformers' model; ``attention`` is "eager" or "sdpa"."""
    config = DecisionTransformerConfig(
        state_dim=task.state_dim,
        act_dim=task.action_dim,
        hidden_size=width,
        n_layer=blocks,
        n_head=heads,
        n_inner=4 * width,
        max_ep_len=task.horizon,
        activation_function="relu",
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = attention
    return DecisionTransformerModel(config)


def batch(
    trajectories: Trajectories, task: Task, context: int, size: int, generator: np.random.Generator
) -> tuple:
    """Return ``size`` windows, each cut, padded on the left and standardised by itself."""
    lengths, columns = trajectories.lengths, [[], [], [], [], []]
    for episode in generator.choice(len(lengths), size, p=lengths / lengths.sum()):
        first = trajectories.starts[episode] + generator.integers(lengths[episode])
        end = trajectories.starts[episode + 1]
        rows, returns = slice(first, min(first + context, end)), np.zeros(end - first, np.float32)
        rewards, total = trajectories.rewards[first:end], 0.0
        for i in range(len(rewards) - 1, -1, -1):
            returns[i] = total = total + rewards[i]
        known = rows.stop - rows.start
        states = (
            trajectories.observations[rows] - trajectories.state_mean
        ) / trajectories.state_std
        steps = np.arange(known) + first - trajectories.starts[episode]
        for column, part in zip(
            columns,
            (
                states,
                trajectories.actions[rows],
                returns[:known, None] / task.return_scale,
                steps,
                np.ones(known),
            ),
            strict=True,
        ):
            column.append(
                np.concatenate([np.zeros((context - known, *part.shape[1:])), part])[None]
            )
    states, actions, returns_to_go, steps, mask = (
        torch.from_numpy(np.concatenate(column)) for column in columns
    )
    return states.float(), actions.float(), returns_to_go.float(), steps.long(), mask.long()


def train(
    model: DecisionTransformerModel,
    trajectories: Trajectories,
    task: Task,
    context: int,
    steps: int,
    size: int = 64,
    device: str = "cpu",
) -> list[float]:
    """Float32 AdamW steps with warm-up, clipping at 0.25 and the loss of each step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 100, 1))
    generator, losses = np.random.default_rng(0), []
    model.train()
    for _ in range(steps):
        states, actions, returns_to_go, time_steps, mask = (
            part.to(device) for part in batch(trajectories, task, context, size, generator)
        )
        predicted = model(
            states=states,
            actions=actions,
            rewards=None,
            returns_to_go=returns_to_go,
            timesteps=time_steps,
            attention_mask=mask,
        ).action_preds
        loss = torch.mean((predicted[mask > 0] - actions[mask > 0]) ** 2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach().cpu().item())
    return losses


@torch.no_grad()
def evaluate(
    model: DecisionTransformerModel,
    state_mean: np.ndarray,
    state_std: np.ndarray,
    task: Task,
    context: int,
    episodes: int,
    device: str = "cpu",
    horizon: int = 1000,
) -> tuple[int, float]:
    """One episode after the other: environment steps and seconds."""
    model.eval()
    environment, began, taken = task.make_environment(), time.perf_counter(), 0
    mean, std = (torch.from_numpy(part).to(device) for part in (state_mean, state_std))
    for episode in range(episodes):
        state, _ = environment.reset(seed=episode)
        states = torch.zeros(0, task.state_dim, device=device)
        actions = torch.zeros(0, task.action_dim, device=device)
        returns_to_go = torch.full((1, 1), task.targets[0] / task.return_scale, device=device)
        ended = False
        while not ended:
            states = torch.cat([states, torch.from_numpy(state).float().to(device)[None]])
            actions = torch.cat([actions, torch.zeros(1, task.action_dim, device=device)])
            shown = slice(-context, None)
            pad = context - len(states[shown])

            def padded(part: torch.Tensor, pad: int = pad) -> torch.Tensor:
                return torch.cat(
                    [torch.zeros(pad, *part.shape[1:], dtype=part.dtype, device=part.device), part]
                )[None]

            steps = torch.arange(len(states), device=device)[shown]
            action = model(
                states=padded((states[shown] - mean) / std),
                actions=padded(actions[shown]),
                rewards=None,
                returns_to_go=padded(returns_to_go[shown]),
                timesteps=padded(steps),
                attention_mask=padded(torch.ones_like(steps)),
            ).action_preds[0, -1]
            actions[-1] = action
            state, reward, terminated, truncated, _ = environment.step(action.cpu().numpy())
            returns_to_go = torch.cat(
                [returns_to_go, returns_to_go[-1:] - reward / task.return_scale]
            )
            taken, ended = taken + 1, terminated or truncated or len(states) == horizon
    return taken, time.perf_counter() - began
