"""Data made here: shipped actors act in the real environment, into a file in D4RL's layout."""

import contextlib
import functools
import io
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import h5py
import joblib
import numpy as np
from safetensors.numpy import load_file

from dtlib.errors import UserError
from dtlib.parallel import in_processes
from dtlib.progress import tqdm
from dtlib.sources.episodes import KEYS, fingerprint
from dtlib.storage import atomic_write, cache_root, digest, locked, memory
from dtlib.tasks import Task, mujoco

QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
POLICIES = Path(__file__).parents[1] / "policies"
STEPS_A_PROCESS = 10_000  # for fewer, starting another process takes longer than it saves
COLUMNS = {
    **dict.fromkeys(("observations", "actions", "rewards"), np.float32),
    **dict.fromkeys(("terminals", "timeouts"), bool),
    "next_observations": np.float32,
}
Weights = dict[str, np.ndarray] | None  # an actor's, (out, in); None: uniformly random actions
Episode = dict[str, np.ndarray]  # COLUMNS, one row a step


@functools.cache
def _four_environments(task: Task, thread: int) -> list[gymnasium.Env]:
    return [task.make_environment() for _ in range(4)]


def act(weights: Weights, states: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return actions (B, A): tanh(μ(s) + σ(s)·noise) of raw states (B, S), or the noise itself.

    Four of B rows at a time keep OpenBLAS on one thread, so that its rounding is always the same.
    """

    def linear(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    if weights is None:
        return noise.copy()
    hidden = states.reshape(-1, 4, states.shape[-1])
    hidden = np.maximum(linear("hidden.1", np.maximum(linear("hidden.0", hidden), 0)), 0)
    std = np.exp(np.clip(linear("log_std", hidden), -20, 2))
    return np.tanh(linear("mean", hidden) + std * noise.reshape(std.shape)).reshape(noise.shape)


def collect(task: Task, quality: str, steps: int, seed: int = 0, progress: bool = True) -> Path:
    """Return the HDF5 file with ``steps`` steps of ``quality``, made on first use.

    The same arguments give the same bytes on one machine. Several policies share the steps evenly,
    in whole episodes; only the last one is cut, at exactly ``steps``, as in D4RL. Raises UserError.
    """
    policies = policy_files(task, quality)
    if steps < 1 or seed < 0:
        expected = "at least 1 step and a seed from 0"
        raise UserError(f"Cannot collect {steps} steps with seed {seed}: expected {expected}.")
    if (size := 4 * steps * (2 * task.state_dim + task.action_dim)) > memory():
        has = f"this machine has {memory() / 1e9:.0f} GB"
        raise UserError(f"{steps} steps take {size / 1e9:.0f} GB of memory, {has}: collect fewer.")
    origin = {"layout": 1, "mujoco": mujoco.__version__, "gymnasium": gymnasium.__version__}
    code = digest(str(origin).encode(), *(path.read_bytes() for path in policies if path))[:8]
    out = cache_root() / "data" / f"{task.name}-{quality}-{steps}-seed{seed}-{code}.hdf5"
    if out.exists():  # in a cache that cannot be written, too
        return out
    with locked(out):
        if out.exists():
            return out
        episodes = list(_episodes(task, quality, policies, steps, seed, progress))
        with h5py.File(image := io.BytesIO(), "w") as file:  # on a full disk HDF5 itself crashes
            for key in COLUMNS:  # without times: the bytes depend on the arguments alone
                rows = np.concatenate([episode[key] for episode in episodes])[:steps]
                file.create_dataset(key, data=rows, track_times=False)
            file.attrs["sha256"] = fingerprint(file[key][()] for key in KEYS)
            names = [path.stem if path else "random" for path in policies]
            file.attrs.update(origin, environment=task.environment, seed=seed, policies=names)
        with atomic_write(out) as temporary:
            temporary.write_bytes(image.getbuffer())
    return out


def policy_files(task: Task, quality: str) -> list[Path | None]:
    """Return files of the actors that make ``quality``, in order; None: random actions."""
    plan = POLICIES / task.name / "policies.json"
    shipped = json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else {}
    wanted = {"random": [], "medium-expert": ["medium", "expert"]}.get(quality, [quality])
    if missing := [name for name in wanted if shipped.get(name) is None]:
        known = ", ".join(["random", *(name for name, step in shipped.items() if step is not None)])
        policy = f"{task.name}'s {missing[0]} policy"
        raise UserError(f"collected:{quality} needs {policy}; shipped are only: {known}.")
    numbers = [step for name in wanted for step in np.atleast_1d(shipped[name])]
    return [plan.with_name(f"{step}.safetensors") for step in numbers] or [None]


def _episodes(
    task: Task, quality: str, policies: list, steps: int, seed: int, progress: bool
) -> Iterator[Episode]:
    """Yield the fewest episodes that give each policy its share of ``steps``."""
    actors = [load_file(path) if path else None for path in policies]
    taken, ends = 0, [steps * number // len(actors) for number in range(1, len(actors) + 1)]

    def current() -> int:  # number of the first policy that has not got its share
        return sum(taken >= end for end in ends)

    def groups() -> Iterator[tuple[int, Weights, int]]:
        for number, weights in enumerate(actors):
            for group in itertools.count():
                if number < current():
                    break
                yield number, weights, group

    processes = min(joblib.effective_n_jobs(-1), steps // STEPS_A_PROCESS)
    job = functools.partial(_four_episodes, task, seed)
    found = in_processes(job, groups(), processes, "free some and run again")
    bar = tqdm(desc=f"collecting {task.name} {quality}", total=steps, disable=not progress)
    with bar, contextlib.closing(found):
        for number, episodes in found:  # processes go ahead: what a policy has too much is dropped
            for episode in episodes:
                if number == current():
                    taken += len(episode["rewards"])
                    yield episode
                    bar.update(min(taken, steps) - bar.n)


def _four_episodes(task: Task, seed: int, which: tuple) -> tuple[int, list[Episode]]:
    """Return the policy's number and its episodes 4·group to 4·group + 3, made side by side."""
    policy, weights, group = which
    environments = _four_environments(task, threading.get_ident())
    generators = [np.random.default_rng([seed, 4 * group + slot]) for slot in range(4)]
    states = np.zeros((4, task.state_dim), np.float32)
    noise = np.zeros((4, task.action_dim), np.float32)
    for slot, generator in enumerate(generators):
        states[slot], _ = environments[slot].reset(seed=int(generator.integers(2**31)))
    running, rows = [0, 1, 2, 3], ([], [], [], [])
    while running:
        for slot in running:
            draw, size = generators[slot], task.action_dim
            noise[slot] = draw.standard_normal(size) if weights else draw.uniform(-1, 1, size)
        actions = act(weights, states, noise)  # idle rows too, see there
        for slot in running.copy():
            following, reward, terminal, timeout, _ = environments[slot].step(actions[slot])
            before = states[slot].copy()
            rows[slot].append((before, actions[slot], reward, terminal, timeout, following))
            states[slot] = following
            if terminal or timeout:
                running.remove(slot)
    return policy, [
        {key: np.array([row[i] for row in part], COLUMNS[key]) for i, key in enumerate(COLUMNS)}
        for part in rows
    ]
