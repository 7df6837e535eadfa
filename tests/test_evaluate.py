"""Lockstep rollouts against one episode at a time, in real environments."""

import numpy as np
import pytest
import torch

from dtlib.evaluate import rollout
from dtlib.seeding import stream_seed
from dtlib.starts import build_model
from dtlib.tasks import TASKS, get_task


def build(task):
    return build_model("random-matched", "chibit", task, seed=3)


def statistics(task):
    draw = np.random.default_rng(0)
    return draw.normal(0, 0.1, task.state_dim).astype(np.float32), draw.uniform(
        0.5, 2, task.state_dim
    ).astype(np.float32)


@torch.no_grad()
def one_episode(model, task, mean, std, target, context, seed, episode, horizon):
    """The papers' evaluation of one episode, written plainly, with lists that grow."""
    env = task.make_environment()
    state, _ = env.reset(seed=stream_seed(seed, "evaluation", episode) % 2**31)
    states, actions, returns_to_go, total = [], [], [target / task.return_scale], 0.0
    for t in range(horizon):
        states.append((state - mean) / std)
        actions.append(np.zeros(task.action_dim))
        first = max(0, t + 1 - context)
        action = model(
            *(
                torch.as_tensor(np.array(part[first:]), dtype=torch.float64).unsqueeze(0)
                for part in (states, actions, returns_to_go)
            ),
            torch.arange(first, t + 1).unsqueeze(0),
        )[0, -1].numpy()
        actions[-1] = action
        state, reward, terminated, _, _ = env.step(action)
        total += reward
        returns_to_go.append(returns_to_go[-1] - reward / task.return_scale)
        if terminated:
            break
    return total, t + 1


@pytest.mark.parametrize("context", [1, 20])
@pytest.mark.parametrize("name", TASKS)
def test_lockstep_equals_one_at_a_time(name, context):
    """In float64 and over few steps: contacts multiply rounding differences quickly."""
    task, horizon = get_task(name), 10 if name == "halfcheetah" else 60
    model, (mean, std) = build(task).double().eval(), statistics(task)
    options = {"target_return": task.targets[0], "context": context, "seed": 7, "horizon": horizon}
    together = rollout(model, task, mean, std, episodes=5, **options)
    for episode in range(5):
        alone = one_episode(
            model,
            task,
            mean.astype(float),
            std.astype(float),
            task.targets[0],
            context,
            7,
            episode,
            horizon,
        )
        assert together.lengths[episode] == alone[1]
        assert together.returns[episode] == pytest.approx(alone[0], abs=1e-6)
    fewer = rollout(model, task, mean, std, episodes=2, **options)
    assert fewer.returns == pytest.approx(together.returns[:2], abs=1e-6)
    if name != "halfcheetah":  # which never falls
        assert len(set(together.lengths)) > 1, (
            "episodes that end at different times are what lockstep must get right"
        )


def test_same_seed_same_returns_another_seed_others():
    task = get_task("hopper")
    model, (mean, std) = build(task), statistics(task)
    runs = [
        rollout(model, task, mean, std, target_return=3600, episodes=3, context=5, seed=s).returns
        for s in (0, 0, 1)
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


def test_target_return_reaches_the_model():
    task = get_task("hopper")
    model, (mean, std) = build(task), statistics(task)
    low, high = (
        rollout(model, task, mean, std, target_return=t, episodes=2, context=5, seed=0).returns
        for t in (0, 3600)
    )
    assert not np.array_equal(low, high)
