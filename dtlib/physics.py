"""Many environments of one task side by side, without gymnasium's Python around each, and the same to the last bit."""

import copy
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np

from dtlib.tasks import Task


class Environments:
    """gymnasium's environments of ``task``, one per seed, just reset; ``observations`` (n, S) float64 are their first states.

    MuJoCo steps them in ``threads`` threads, and lets go of Python's lock while it does; what gymnasium computes in Python
    from a state (observation, reward, end of the episode) is done here for all of them at once, with gymnasium's constants.
    """

    def __init__(self, task: Task, seeds: list[int], threads: int = 1) -> None:
        self.environment = task.make_environment().unwrapped
        first = [(self.environment.reset(seed=seed)[0], copy.copy(self.environment.data)) for seed in seeds]
        self.observations, self.data = np.stack([state for state, _ in first]), [data for _, data in first]
        self.positions = np.stack([data.qpos for data in self.data])
        self.velocities = np.stack([data.qvel for data in self.data])
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.threads = threads

    def step(self, chosen: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Environments number ``chosen`` (m,) act: actions (m, A) float64 → observations (m, S), rewards (m,), ends (m,)."""
        before = self.positions[chosen, 0]
        if self.pool is None:
            self._advance(chosen, actions)
        else:  # a list, so that an error in a thread is raised here
            list(self.pool.map(self._advance, np.array_split(chosen, self.threads), np.array_split(actions, self.threads)))
        environment, position, velocity = self.environment, self.positions[chosen], self.velocities[chosen]
        rewards = environment._forward_reward_weight * ((position[:, 0] - before) / environment.dt)
        ends = np.zeros(len(chosen), bool)
        seen = velocity
        if hasattr(environment, "_healthy_reward"):  # Hopper and Walker2d, which can fall
            low, high = np.transpose([environment._healthy_z_range, environment._healthy_angle_range])
            healthy = ((low < position[:, 1:3]) & (position[:, 1:3] < high)).all(1)
            if hasattr(environment, "_healthy_state_range"):
                low, high = environment._healthy_state_range
                state = np.hstack([position, velocity])[:, 2:]
                healthy &= ((low < state) & (state < high)).all(1)
            rewards, ends, seen = rewards + environment._healthy_reward, ~healthy, np.clip(velocity, -10, 10)
        rewards = rewards - environment._ctrl_cost_weight * np.square(actions).sum(1)
        return np.hstack([position[:, 1:], seen]), rewards, ends

    def _advance(self, chosen: np.ndarray, actions: np.ndarray) -> None:
        model, substeps = self.environment.model, self.environment.frame_skip
        for number, action in zip(chosen, actions, strict=True):
            data = self.data[number]
            data.ctrl[:] = action
            mujoco.mj_step(model, data, nstep=substeps)
            self.positions[number], self.velocities[number] = data.qpos, data.qvel
