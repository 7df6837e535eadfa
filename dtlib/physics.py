"""Many environments of one task side by side, without gymnasium's Python around each, and the same to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np

from dtlib.tasks import Task

EVERYTHING = mujoco.mjtState.mjSTATE_INTEGRATION  # time, positions, velocities, …: all that the next step depends on


class Environments:
    """gymnasium's environments of ``task``, one per seed, just reset; ``observations`` (n, S) float64 are their first states.

    MuJoCo steps them in ``threads`` threads, and lets go of Python's lock while it does; what gymnasium computes in Python
    from a state (observation, reward, end of the episode) is done here for all of them at once, with gymnasium's constants.
    """

    def __init__(self, task: Task, seeds: list[int], threads: int = 1) -> None:
        self.environment = task.make_environment().unwrapped
        self.model, self.observations = self.environment.model, np.empty((len(seeds), task.state_dim))
        # One simulation a thread is faster than one an environment: its memory stays in the processor's cache.
        self._simulations = [mujoco.MjData(self.model) for _ in range(threads)]
        self._states = np.empty((len(seeds), mujoco.mj_stateSize(self.model, EVERYTHING)))
        for i, seed in enumerate(seeds):
            self.observations[i], _ = self.environment.reset(seed=seed)
            mujoco.mj_getState(self.model, self.environment.data, self._states[i], EVERYTHING)
        self._pool = ThreadPoolExecutor(max(threads - 1, 1))  # this thread is one of them

    def step(self, chosen: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Environments number ``chosen`` (m,) act: actions (m, A) float64 → observations (m, S), rewards (m,), ends (m,)."""
        environment, before = self.environment, self._states[chosen, 1]
        numbers, shares = (np.array_split(part, len(self._simulations)) for part in (chosen, actions))
        others = [self._pool.submit(self._advance, *share)
                  for share in zip(self._simulations[1:], numbers[1:], shares[1:], strict=True)]
        self._advance(self._simulations[0], numbers[0], shares[0])
        for other in others:
            other.result()  # raises what went wrong there
        _, position, velocity, _ = np.split(self._states[chosen], np.cumsum([1, self.model.nq, self.model.nv]), axis=1)
        rewards = environment._forward_reward_weight * ((position[:, 0] - before) / environment.dt)
        ends, seen = np.zeros(len(chosen), bool), velocity
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

    def _advance(self, simulation: mujoco.MjData, chosen: np.ndarray, actions: np.ndarray) -> None:
        model, substeps = self.model, self.environment.frame_skip
        for number, action in zip(chosen, actions, strict=True):
            mujoco.mj_setState(model, simulation, self._states[number], EVERYTHING)
            simulation.ctrl[:] = action
            mujoco.mj_step(model, simulation, nstep=substeps)
            mujoco.mj_getState(model, simulation, self._states[number], EVERYTHING)
