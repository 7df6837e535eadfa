"""Tasks against the environments they name, scores against numbers known from elsewhere."""

import warnings

import numpy as np
import pytest

from dtlib.errors import UserError
from dtlib.tasks import TASKS, get_task


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_environment_has_the_tasks_shapes_and_horizon_and_is_silent(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = task.make_environment()
    assert environment.observation_space.shape == (task.state_dim,)
    assert environment.action_space.shape == (task.action_dim,)
    assert np.all(environment.action_space.low == -1) and np.all(environment.action_space.high == 1)
    assert environment.spec.max_episode_steps == task.horizon == 1000
    assert environment.spec.id.endswith("-v4")
    assert list(tmp_path.iterdir()) == []  # MuJoCo would leave a log file here


def test_scores_are_0_and_100_at_their_references_and_take_arrays():
    for task in TASKS.values():
        for name, reference in (("D4RL", task.d4rl_reference), ("Takagi", task.takagi_reference)):
            np.testing.assert_allclose(task.scores(np.array(reference))[name], [0, 100], atol=1e-9)
    assert get_task("hopper").scores(1422.0)["D4RL"] == pytest.approx(44.3, abs=0.05)


@pytest.mark.parametrize(
    "name, takagi, d4rl",
    [("hopper", 79.5, 86.5), ("halfcheetah", 48.4, 42.6), ("walker2d", 71.2, 76.3)],
)
def test_the_papers_scores_translate_between_the_two_scales(name, takagi, d4rl):
    task = get_task(name)
    random, expert = task.takagi_reference
    scores = task.scores(random + takagi / 100 * (expert - random))
    assert scores["Takagi"] == pytest.approx(takagi)
    assert scores["D4RL"] == pytest.approx(d4rl, abs=0.06)


def test_first_target_is_the_one_reported():
    assert {task.name: task.targets[0] for task in TASKS.values()} == {
        "hopper": 3600,
        "halfcheetah": 6000,
        "walker2d": 5000,
    }


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UserError, match="'ant'.*hopper, halfcheetah, walker2d"):
        get_task("ant")
