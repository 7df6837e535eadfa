"""Offline data made here: the actors in ``policies/<task>`` act in the real environment, into a file in D4RL's layout."""

import hashlib
import io
import json
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from dtlib.errors import UserError, atomic_write, cache_root, locked
from dtlib.tasks import Task

QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
POLICIES = Path(__file__).parent / "policies"
LOCKSTEP = 8  # environments side by side; a multiple of 4, see act
COLUMNS = {"observations": np.float32, "actions": np.float32, "rewards": np.float32, "terminals": bool,
           "timeouts": bool, "next_observations": np.float32}
Weights = dict[str, np.ndarray] | None  # an actor's, (out, in) as in torch; None: uniformly random actions
Episode = dict[str, np.ndarray]  # the columns, one row a step


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

    Several policies share the steps evenly, in whole episodes; only the last episode is cut, at exactly ``steps``, as
    in D4RL. ``UserError``: unknown quality, a policy that is not shipped, steps or seed out of range, a full disk.
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
        environments, parts = [task.make_environment() for _ in range(LOCKSTEP)], []
        with tqdm(desc=f"collecting {task.name} {quality}", total=steps, unit=" steps", disable=not progress) as bar:
            for done, path in enumerate(policies, 1):
                share = steps * done // len(policies) - sum(len(part["rewards"]) for part in parts)
                parts += _episodes(environments, load_file(path) if path else None, seed, share, bar)
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


def _episodes(environments: list[gymnasium.Env], weights: Weights, seed: int, steps: int, bar: tqdm) -> list[Episode]:
    """Whole episodes 0, 1, 2, … until they make ``steps``; episode i depends on the policy, ``seed`` and i alone."""
    states = np.zeros((LOCKSTEP, *environments[0].observation_space.shape), np.float32)
    noise = np.zeros((LOCKSTEP, width := environments[0].action_space.shape[0]), np.float32)
    episodes, running, taken = [], {}, 0
    while running or taken < steps:
        # A free environment takes the next number. What has started runs to its end: short episodes are not favoured.
        for slot, environment in enumerate(environments):
            if slot not in running and taken < steps:
                generator = np.random.default_rng([seed, len(episodes)])
                states[slot], _ = environment.reset(seed=int(generator.integers(2**31)))
                running[slot] = len(episodes), generator, []
                episodes.append({})
        for slot, (_, generator, _) in running.items():
            noise[slot] = generator.standard_normal(width) if weights else generator.uniform(-1, 1, width)
        actions = act(weights, states, noise)  # idle rows too: the batch keeps its shape, and so its rounding
        bar.update(max(0, min(len(running), steps - taken)))
        taken += len(running)
        for slot, (number, _, rows) in list(running.items()):
            following, reward, terminal, timeout, _ = environments[slot].step(actions[slot])
            rows.append((states[slot].copy(), actions[slot], reward, terminal, timeout, following))
            states[slot] = following
            if terminal or timeout:
                episodes[number] = {key: np.array([r[i] for r in rows], COLUMNS[key]) for i, key in enumerate(COLUMNS)}
                del running[slot]
    return episodes[:np.searchsorted(np.cumsum([0, *(len(episode["rewards"]) for episode in episodes)]), steps)]
