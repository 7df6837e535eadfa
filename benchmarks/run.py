"""What the main stages cost on this machine: collecting, loading, training steps, rollouts.

    make bench            (or: python benchmarks/run.py)

Writes benchmarks/results.csv. Absolute times hold for the machine they were taken on; ratios travel better.
"""

import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

from dtlib import data
from dtlib.collect import collect
from dtlib.evaluate import rollout
from dtlib.model import build_model
from dtlib.tasks import get_task
from dtlib.train import make_optimiser, train_epoch

TASK = get_task("hopper")
rows = []


def record(what: str, value: float, unit: str) -> None:
    rows.append({"what": what, "value": round(value, 3), "unit": unit})
    print(f"{what:<66}{value:>12.2f} {unit}", flush=True)


def seconds(action, *arguments, **options) -> tuple[float, object]:
    began = time.perf_counter()
    result = action(*arguments, **options)
    return time.perf_counter() - began, result


def collecting() -> data.Trajectories:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DTLIB_CACHE"] = folder
        took, path = seconds(collect, TASK, "medium", 100_000, progress=False)
        record("collect 100,000 Hopper steps, medium", took, "s")
        return data.load(str(path), TASK)


def loading(trajectories: data.Trajectories) -> None:
    times = -(-1_000_000 // len(trajectories.rewards))
    ends = np.zeros(len(trajectories.rewards), bool)
    ends[trajectories.starts[1:] - 1] = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "million.hdf5"
        with h5py.File(path, "w") as file:
            for key, array in {"observations": trajectories.observations, "actions": trajectories.actions,
                               "rewards": trajectories.rewards, "terminals": ends, "timeouts": np.zeros_like(ends)}.items():
                file[key] = np.concatenate([array] * times)[:1_000_000]
        took, _ = seconds(data.load, str(path), TASK)
    record("load 1,000,000 steps from HDF5", took, "s")
    record("largest memory of this process so far", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB")


def training(trajectories: data.Trajectories, size: str, context: int, batch: int, steps: int) -> None:
    """Plain float32 steps of the reference path, on one thread as every run has on a CPU, or on the CUDA device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = data.WindowSampler(trajectories, context, TASK.return_scale, device)
    model = build_model("random-matched", size, TASK, seed=0).to(device)
    optimiser = make_optimiser(model, 1e-4, 1e-4, 1e-8)
    starts = torch.randint(sampler.number_of_steps, (steps, batch)).to(device)
    options = {"first_step": 0, "learning_rate": 1e-4, "warmup_steps": 10, "gradient_clip": 0.25}
    train_epoch(model, optimiser, sampler, starts[:3], **options)
    took, _ = seconds(train_epoch, model, optimiser, sampler, starts, **options)
    record(f"training step, {size}, K = {context}, batch {batch}, {device}", 1e3 * took / steps, "ms")


def rollouts(trajectories: data.Trajectories, context: int) -> None:
    """Environment steps per second: twenty episodes in lockstep, and the same ones one at a time."""
    model = build_model("random-matched", "mini", TASK, seed=0)
    options = {"target_return": 3600, "context": context, "seed": 0}
    speed = {}
    for together in (20, 1):
        began, steps = time.perf_counter(), 0
        for first in range(0, 20, together):
            steps += rollout(model, TASK, trajectories.state_mean, trajectories.state_std, episodes=together,
                             first_episode=first, **options).lengths.sum()
        speed[together] = steps / (time.perf_counter() - began)
        record(f"rollout, mini, K = {context}, {together} at a time", speed[together], "environment steps/s")
    record(f"rollout, K = {context}: lockstep over one at a time", speed[20] / speed[1], "×")


def main() -> None:
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("torch", "transformers", "mujoco", "gymnasium", "numpy")}
    print(f"{platform.platform()}, {os.cpu_count()} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    trajectories = collecting()
    loading(trajectories)
    for size, context, batch, steps in (("mini", 20, 8, 60), ("mini", 20, 64, 9), ("mini", 1, 64, 60), ("chibit", 20, 64, 9)):
        training(trajectories, size, context, batch, steps)
    for context in (1, 20):
        rollouts(trajectories, context)
    pd.DataFrame(rows).to_csv(Path(__file__).with_name("results.csv"), index=False)


if __name__ == "__main__":
    main()
