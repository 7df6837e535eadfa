"""Fit this machine's rates, and check what they predict against finished runs.

    python benchmarks/cost.py            (after make figures; five minutes, on an idle machine)

Every core is busy while rates are measured, as it is while runs go side by side. Writes cost.csv and cost.png into this
folder, and prints the rates for `dtlib/cost.py`.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls

from dtlib import cost, data, plots, runs
from dtlib.evaluate import rollout
from dtlib.model import build_model
from dtlib.tasks import get_task
from dtlib.train import make_optimiser, train_epoch

HERE = Path(__file__).parent
STEPS = [("tiny", 20, 16), ("mini", 20, 4), ("mini", 20, 16), ("mini", 20, 64), ("mini", 5, 16), ("mini", 1, 16),
         ("mini", 1, 64), ("chibit", 20, 16), ("small", 20, 4), ("small", 1, 64), ("gpt2", 20, 1)]
ROLLOUTS = [("hopper", "tiny", 1, 2), ("hopper", "tiny", 1, 100), ("halfcheetah", "tiny", 1, 100), ("hopper", "mini", 1, 8),
            ("hopper", "mini", 20, 2), ("hopper", "mini", 20, 8), ("halfcheetah", "mini", 1, 8),
            ("halfcheetah", "mini", 20, 8), ("walker2d", "mini", 1, 20), ("hopper", "small", 20, 4)]


def measured(repeats: int = 10) -> list[tuple[cost.Work, float]]:
    """Work and seconds of training steps and rollouts on one thread."""
    torch.set_num_threads(1)
    hopper = get_task("hopper")
    trajectories, found = data.load("collected:medium", hopper, steps=100_000, progress=False), []
    for size, context, batch in STEPS:
        sampler = data.WindowSampler(trajectories, context, hopper.return_scale)
        model = build_model("random-matched", size, hopper, 0, (0.0, 0.0, 0.0))
        optimiser = make_optimiser(model, 1e-4, 1e-4, 1e-8)
        for count in (1, repeats):  # the first one warms up
            starts, began = torch.randint(sampler.number_of_steps, (count, batch)), time.perf_counter()
            train_epoch(model, optimiser, sampler, starts, first_step=0, learning_rate=1e-4, warmup_steps=1,
                        gradient_clip=0.25)
        found.append((cost.step(size, context, batch), (time.perf_counter() - began) / repeats))
    for name, size, context, episodes in ROLLOUTS:
        task = get_task(name)
        model, zeros = build_model("random-matched", size, task, 0), np.zeros(task.state_dim, np.float32)
        for horizon in (5, 150):
            began = time.perf_counter()
            ended = rollout(model, task, zeros, zeros + 1, target_return=task.targets[0], episodes=episodes, context=context,
                            seed=0, horizon=horizon)
        found.append((cost.rollouts(name, size, context, ended.lengths), time.perf_counter() - began))
    return found


def fit() -> tuple[float, ...]:
    """The rates, none below zero, with the least sum of squared relative errors."""
    cores = joblib.cpu_count()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        found = [pair for future in [pool.submit(measured) for _ in range(cores)] for pair in future.result()]
    works, seconds = (np.array(column) for column in zip(*found, strict=True))
    return tuple(nnls(works / seconds[:, None], np.ones(len(seconds)))[0].tolist())


def checked(machine: cost.Machine) -> pd.DataFrame:
    """Of every finished run that this kind of machine trained: seconds taken and predicted."""
    rows = []
    for path in sorted(runs.runs_root().glob("*-K*")):
        run = runs.Run.open(path)
        if run.record["provenance"]["device"] == os.uname().machine and not run.config.cotraining:  # texts are not counted
            works = cost.of_run(run.config, [row["lengths"] for row in run.metrics])
            for part, work in zip(("training", "evaluation"), works, strict=True):
                rows.append({"run": path.name, "size": run.config.size, "K": run.config.context, "part": part,
                             "taken": run.record["provenance"]["seconds"][part], "predicted": machine.seconds(work)})
    table = pd.DataFrame(rows)
    whole = table.groupby(["run", "size", "K"], as_index=False)[["taken", "predicted"]].sum().assign(part="whole run")
    return pd.concat([table, whole], ignore_index=True).assign(ratio=lambda table: table.predicted / table.taken)


def draw(table: pd.DataFrame) -> None:
    plots.use_style()
    figure, ax = plt.subplots(figsize=(4.5, 4.0))
    ends = np.array([table[["taken", "predicted"]].min().min() / 1.5, table[["taken", "predicted"]].max().max() * 1.5])
    ax.fill_between(ends, 0.7 * ends, 1.3 * ends, color="0.9", label="within 30 %")
    for (part, own), name in zip(table.groupby("part", sort=False), ("language", "image", "random-matched"), strict=True):
        ax.plot(own.taken, own.predicted, plots.STYLES[name][1], color=plots.COLOURS[name], linestyle="", label=part)
    ax.set(xscale="log", yscale="log", xlabel="seconds taken", ylabel="seconds predicted", xlim=ends, ylim=ends)
    ax.legend()
    figure.savefig(HERE / "cost.png", dpi=200)


def main() -> None:
    rates = fit()
    print("seconds per operation, byte, kernel, physics unit, round:", ", ".join(f"{rate:.3g}" for rate in rates))
    machine = cost.Machine("this one", rates, joblib.cpu_count())
    table = checked(machine)
    table.to_csv(HERE / "cost.csv", index=False, float_format="%.4g")
    for part, own in table.groupby("part", sort=False):
        print(f"{part}: predicted / taken {own.ratio.median():.2f} (median of {len(own)}); within 30 %: "
              f"{own.ratio.between(0.7, 1.3).mean():.0%}")
    draw(table)


if __name__ == "__main__":
    main()
