"""Offline data made here: the actors in ``policies/<task>`` act in the real environment, into a file in D4RL's layout."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import threading
from multiprocessing import current_process
from pathlib import Path

import gymnasium
import h5py
import joblib
import mujoco
import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from dtlib.errors import UserError, atomic_write, cache_root, locked
from dtlib.tasks import Task
from dtlib.workers import Workers, report

QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
POLICIES = Path(__file__).parent / "policies"
STEPS_A_PROCESS = 10_000  # for fewer, starting another process takes longer than it saves
COLUMNS = {"observations": np.float32, "actions": np.float32, "rewards": np.float32, "terminals": bool,
           "timeouts": bool, "next_observations": np.float32}
Weights = dict[str, np.ndarray] | None  # an actor's, (out, in) as in torch; None: uniformly random actions
Episode = dict[str, np.ndarray]  # the columns, one row a step
_four_environments = functools.cache(lambda task, thread: [task.make_environment() for _ in range(4)])  # a thread's own


def act(weights: Weights, states: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Actions (B, A) in [−1, 1] for raw states (B, S) and noise (B, A): tanh(μ(s) + σ(s)·noise), or the noise itself.

    B is a multiple of 4: four rows at a time keep OpenBLAS on one thread, so that its rounding is always the same.
    """
    def linear(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    if weights is None:
        return noise.copy()
    hidden = states.reshape(-1, 4, states.shape[-1])
    hidden = np.maximum(linear("hidden.1", np.maximum(linear("hidden.0", hidden), 0)), 0)
    spread = np.exp(np.clip(linear("log_std", hidden), -20, 2))
    return np.tanh(linear("mean", hidden) + spread * noise.reshape(spread.shape)).reshape(noise.shape)


def collect(task: Task, quality: str, steps: int, seed: int = 0, progress: bool = True) -> Path:
    """The HDF5 file with ``steps`` steps of ``quality``, made on first use; the same arguments give the same bytes.

    Several policies share the steps evenly, in whole episodes; only the last is cut, at exactly ``steps``, as in D4RL.
    ``UserError``: unknown quality, a policy not shipped, steps or seed out of range, a full disk, a killed process.
    """
    policies = _policies(task, quality)
    if steps < 1 or seed < 0:
        raise UserError(f"Cannot collect {steps} steps with seed {seed}: expected at least 1 step and a seed from 0.")
    origin = {"layout": 1, "mujoco": mujoco.__version__, "gymnasium": gymnasium.__version__}
    digest = hashlib.sha256(b"".join([str(origin).encode(), *(path.read_bytes() for path in policies if path)]))
    out = cache_root() / "data" / f"{task.name}-{quality}-{steps}-seed{seed}-{digest.hexdigest()[:8]}.hdf5"
    with locked(out):
        if out.exists():
            return out
        # A daemon must not have children.
        processes = 1 if current_process().daemon else min(joblib.cpu_count(), steps // STEPS_A_PROCESS)
        parts, taken = [], 0
        with (Workers(processes, "free some and run again") if processes > 1 else contextlib.nullcontext() as pool,
              tqdm(desc=f"collecting {task.name} {quality}", total=steps, unit=" steps", disable=not progress) as bar):
            for done, path in enumerate(policies, 1):
                four = functools.partial(_four_episodes, task, load_file(path) if path else None, seed)
                # In order, 1024 at a time: workers go ahead, and what turns out not to be needed is cancelled or dropped.
                fours = (f for i in itertools.count(0, 256) for f in (pool.map if pool else map)(four, range(i, i + 256)))
                episodes = itertools.chain.from_iterable(fours)
                while taken < steps * done // len(policies):
                    parts.append(next(episodes))
                    taken += len(parts[-1]["rewards"])
                    bar.update(min(taken, steps) - bar.n)
        with h5py.File(image := io.BytesIO(), "w") as file:  # in memory: on a full disk HDF5 itself crashes
            for key in COLUMNS:  # without creation times: the bytes depend on the arguments alone
                file.create_dataset(key, data=np.concatenate([part[key] for part in parts])[:steps], track_times=False)
            file.attrs.update(origin, environment=task.environment, seed=seed,
                              policies=[path.stem if path else "random" for path in policies])
        with atomic_write(out) as temporary:
            temporary.write_bytes(image.getbuffer())
    return out


def _policies(task: Task, quality: str) -> list[Path | None]:
    """Files of the actors that make ``quality``, in order; ``None`` stands for uniformly random actions."""
    plan = POLICIES / task.name / "policies.json"
    shipped = json.loads(plan.read_text()) if plan.exists() else {}
    wanted = {"random": [], "medium-expert": ["medium", "expert"]}.get(quality, [quality])
    if missing := [name for name in wanted if shipped.get(name) is None]:
        known = ", ".join(["random", *(name for name, step in shipped.items() if step is not None)])
        raise UserError(f"collected:{quality} needs {task.name}'s {missing[0]} policy; shipped are only: {known}.")
    return [plan.with_name(f"{step}.safetensors") for name in wanted for step in np.atleast_1d(shipped[name])] or [None]


def _four_episodes(task: Task, weights: Weights, seed: int, group: int) -> list[Episode]:
    """Whole episodes 4·``group`` to 4·``group`` + 3, side by side; each depends on policy, ``seed`` and its number alone."""
    environments = _four_environments(task, threading.get_ident())
    generators = [np.random.default_rng([seed, 4 * group + slot]) for slot in range(4)]
    states, noise = np.zeros((4, task.state_dim), np.float32), np.zeros((4, task.action_dim), np.float32)
    for slot, generator in enumerate(generators):
        states[slot], _ = environments[slot].reset(seed=int(generator.integers(2**31)))
    running, rows = [0, 1, 2, 3], ([], [], [], [])
    while running:
        report(len(running))
        for slot in running:
            generator, size = generators[slot], task.action_dim
            noise[slot] = generator.standard_normal(size) if weights else generator.uniform(-1, 1, size)
        actions = act(weights, states, noise)  # idle rows too, see there
        for slot in running.copy():
            following, reward, terminal, timeout, _ = environments[slot].step(actions[slot])
            rows[slot].append((states[slot].copy(), actions[slot], reward, terminal, timeout, following))
            states[slot] = following
            if terminal or timeout:
                running.remove(slot)
    return [{key: np.array([row[i] for row in part], COLUMNS[key]) for i, key in enumerate(COLUMNS)} for part in rows]
