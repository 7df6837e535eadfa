"""Environments side by side are gymnasium's to the last bit, in any number of threads."""

import numpy as np
import pytest

from dtlib.physics import Environments
from dtlib.tasks import get_task


@pytest.mark.parametrize(("name", "threads"), [("hopper", 3), ("halfcheetah", 1), ("walker2d", 2)])
def test_a_thousand_random_steps_from_twenty_seeds(name, threads):
    """Some act at random, some hardly at all; in half of the steps only some of them act."""
    task, generator, scale = (
        get_task(name),
        np.random.default_rng(0),
        np.linspace(0, 1, 20)[:, None],
    )
    ours, theirs = (
        Environments(task, list(range(20)), threads),
        [task.make_environment() for _ in range(20)],
    )
    first = [environment.reset(seed=seed)[0] for seed, environment in enumerate(theirs)]
    assert np.array_equal(ours.observations, first)
    ended = set()
    for step in range(1000):
        chosen = np.flatnonzero(generator.random(20) < 0.7) if step % 2 else np.arange(20)
        actions = generator.uniform(-1, 1, (len(chosen), task.action_dim)) * scale[chosen]
        observations, rewards, ends = ours.step(chosen, actions)
        expected = [
            theirs[number].unwrapped.step(action)
            for number, action in zip(chosen, actions, strict=True)
        ]
        assert np.array_equal(observations, [row[0] for row in expected])
        assert rewards.tolist() == [row[1] for row in expected] and ends.tolist() == [
            row[2] for row in expected
        ]
        ended |= set(chosen[ends])
    assert bool(ended) == (name != "halfcheetah")


def test_an_error_in_a_thread_is_raised():
    environments = Environments(get_task("hopper"), [0, 1], 2)
    with pytest.raises(ValueError):
        environments.step(np.arange(2), np.zeros((2, 4)))
