"""Many environments of one task side by side, equal to gymnasium's to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dtlib.tasks import Task, mujoco

FULL_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # all that the next step depends on


class Environments:
    """One environment per seed, just reset. ``observations`` (n, S) are the first states.

    MuJoCo steps them in ``threads`` threads. What gymnasium computes in Python from a state
    (observation, reward, end of the episode) is computed here for all of them at once.
    """

    def __init__(self, task: Task, seeds: list[int], threads: int = 1) -> None:
        self.environment = task.make_environment().unwrapped
        self.model = self.environment.model
        self.observations = np.empty((len(seeds), task.state_dim))
        self._states = np.empty((len(seeds), mujoco.mj_stateSize(self.model, FULL_STATE)))
        for i, seed in enumerate(seeds):
            self.observations[i], _ = self.environment.reset(seed=seed)
            mujoco.mj_getState(self.model, self.environment.data, self._states[i], FULL_STATE)
        # One simulation per thread stays in the processor's cache; one per environment would not.
        self._simulations = [mujoco.MjData(self.model) for _ in range(threads)]
        self._map = map if threads == 1 else ThreadPoolExecutor(threads).map

    def step(
        self, chosen: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step the environments ``chosen`` (m,) with actions (m, A) float64.

        Returns observations (m, S), rewards (m,) and whether each episode ends (m,).
        """
        before, count = self._states[chosen, 1], len(self._simulations)
        shares = np.array_split(chosen, count), np.array_split(actions, count)
        list(self._map(self._advance, self._simulations, *shares))  # raises what went wrong there
        sizes = np.cumsum([1, self.model.nq, self.model.nv])
        _, position, velocity, _ = np.split(self._states[chosen], sizes, axis=1)
        environment = self.environment
        speed = (position[:, 0] - before) / environment.dt
        rewards = environment._forward_reward_weight * speed
        ends = np.zeros(len(chosen), bool)
        if hasattr(environment, "_healthy_reward"):  # Hopper and Walker2d can fall
            ends = ~self._healthy(position, velocity)
            rewards = rewards + environment._healthy_reward
            velocity = np.clip(velocity, -10, 10)
        rewards = rewards - environment._ctrl_cost_weight * np.square(actions).sum(1)
        return np.hstack([position[:, 1:], velocity]), rewards, ends

    def _healthy(self, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        environment = self.environment
        ranges = [environment._healthy_z_range, environment._healthy_angle_range]
        low, high = np.transpose(ranges)
        healthy = ((low < position[:, 1:3]) & (position[:, 1:3] < high)).all(1)
        if hasattr(environment, "_healthy_state_range"):
            low, high = environment._healthy_state_range
            state = np.hstack([position, velocity])[:, 2:]
            healthy &= ((low < state) & (state < high)).all(1)
        return healthy

    def _advance(self, simulation: mujoco.MjData, chosen: np.ndarray, actions: np.ndarray) -> None:
        for number, action in zip(chosen, actions, strict=True):
            mujoco.mj_setState(self.model, simulation, self._states[number], FULL_STATE)
            simulation.ctrl[:] = action
            mujoco.mj_step(self.model, simulation, nstep=self.environment.frame_skip)
            mujoco.mj_getState(self.model, simulation, self._states[number], FULL_STATE)
