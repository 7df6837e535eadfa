"""What the fast path gains on this machine: each figure beside the plain way, in the same run.

    make bench            (ten minutes; or: python benchmarks/run.py)

Writes results.csv, growth.csv, parts.csv, machine.json and three figures into this folder. Absolute
times hold for the machine that they were taken on; ratios travel better.
"""

import json
import logging
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import baselines
import h5py
import matplotlib.pyplot as plt
import mujoco
import mujoco.rollout
import numpy as np
import pandas as pd
import torch
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dtlib import data, figures, runs
from dtlib.build import load_data
from dtlib.config import SIZES
from dtlib.devices import fast_precision
from dtlib.evaluate import rollout
from dtlib.physics import Environments
from dtlib.sources.collected import collect
from dtlib.starts import build_model
from dtlib.tasks import get_task
from dtlib.train import action_loss, make_optimiser, predict, train_epoch

HERE = Path(__file__).parent
HOPPER, CHEETAH = (
    get_task("hopper"),
    get_task("halfcheetah"),
)  # HalfCheetah never falls: all episodes have the same length
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "gpt2" if DEVICE == "cuda" else "chibit"  # 12 × 768 × 12, or 3 × 128 × 1
PRECISIONS = list(dict.fromkeys(["float32", fast_precision(DEVICE)]))
rows = []


def record(
    what: str, value: float, unit: str, plain: float | None = None, against: str = ""
) -> None:
    """Keep a figure and, where there is a ``plain`` one, the ratio (above 1: faster than that)."""
    ratio = None if plain is None else value / plain if unit.endswith("/s") else plain / value
    rows.append(
        {
            "what": what,
            "value": value,
            "unit": unit,
            "against": against,
            "plain": plain,
            "ratio": ratio,
        }
    )
    tqdm.write(
        f"{what:<52}{value:>10.3g} {unit:<7}"
        + (f"{ratio:>6.2f} × {against} ({plain:.3g})" if ratio else "")
    )


def seconds(action: Callable, repeats: int = 1) -> float:
    """Mean time of ``action``, after one call that does not count if there is more than one."""
    if repeats > 1:
        action()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def stages() -> data.Trajectories:
    """Collecting, and loading a million steps."""
    found = []
    took = seconds(lambda: found.append(collect(HOPPER, "medium", 100_000, progress=False)))
    record("collect 100,000 Hopper steps", took, "s")
    trajectories = data.load(str(found[0]), HOPPER)
    times = -(-1_000_000 // len(trajectories.rewards))
    ends = np.zeros(len(trajectories.rewards), bool)
    ends[trajectories.starts[1:] - 1] = True
    columns = {
        "observations": trajectories.observations,
        "actions": trajectories.actions,
        "rewards": trajectories.rewards,
        "terminals": ends,
        "timeouts": np.zeros_like(ends),
    }
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(path := Path(folder, "million.hdf5"), "w") as file:
            for key, array in columns.items():
                file[key] = np.concatenate([array] * times)[:1_000_000]
        record("load 1,000,000 steps from HDF5", seconds(lambda: data.load(str(path), HOPPER)), "s")
    record("largest memory so far", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB")
    return trajectories


def step_time(
    trajectories: data.Trajectories,
    context: int,
    batch: int = 64,
    size: str = SIZE,
    precision: str = "float32",
    repeats: int = 10,
) -> float:
    """Seconds of one of dtlib's training steps, windows included."""
    sampler = data.WindowSampler(trajectories, context, HOPPER.return_scale, DEVICE)
    model = build_model("random", size, HOPPER, seed=0, dropout=(0.1, 0.1, 0.1)).to(DEVICE)
    optimiser = make_optimiser(model, 1e-4)
    starts = torch.randint(
        sampler.number_of_steps, (repeats, batch), generator=torch.Generator().manual_seed(0)
    ).to(DEVICE)
    return (
        seconds(
            lambda: train_epoch(
                model,
                optimiser,
                sampler,
                starts,
                rate=lambda step: 1e-4,
                gradient_clip=0.25,
                precision=precision,
            ),
            2,
        )
        / repeats
    )


def d3rlpy_step_time(trajectories: data.Trajectories, context: int, repeats: int) -> float:
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    ends = np.zeros(len(trajectories.rewards))
    ends[trajectories.starts[1:] - 1] = 1
    dataset = d3rlpy.dataset.MDPDataset(
        trajectories.observations, trajectories.actions, trajectories.rewards[:, None], ends
    )
    blocks, _, heads = SIZES[SIZE]  # its width of 128 is its default, and its activation is ReLU
    algorithm = d3rlpy.algos.DecisionTransformerConfig(
        batch_size=64,
        context_size=context,
        num_heads=heads,
        num_layers=blocks,
        max_timestep=HOPPER.horizon,
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(
            mean=trajectories.state_mean, std=trajectories.state_std
        ),
    ).create(device=DEVICE == "cuda")
    algorithm.build_with_dataset(dataset)
    return seconds(lambda: algorithm.update(dataset.sample_trajectory_batch(64, context)), repeats)


def matrix_peak(precision: str) -> float:
    """Floating-point operations per second of one large matrix product."""
    n = 8192 if DEVICE == "cuda" else 1536
    a = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, precision))
    return 2 * n**3 / seconds(lambda: a @ a, 5)


def training(trajectories: data.Trajectories) -> None:
    """A step against three other ways to make it."""
    peaks = {precision: matrix_peak(precision) for precision in PRECISIONS}
    for context, repeats in ((20, 8), (1, 60)):
        others = {}
        for name, attention in (
            ("plain loop", "eager"),
            ("transformers, its own attention", "sdpa"),
        ):
            model = baselines.make_model(HOPPER, *SIZES[SIZE], attention).to(DEVICE)
            baselines.train(model, trajectories, HOPPER, context, 2, device=DEVICE)
            others[name] = (
                seconds(
                    lambda model=model, context=context, repeats=repeats: baselines.train(
                        model, trajectories, HOPPER, context, repeats, device=DEVICE
                    )
                )
                / repeats
            )
        try:
            others["d3rlpy"] = d3rlpy_step_time(trajectories, context, repeats)
        except ModuleNotFoundError as error:
            tqdm.write(f"d3rlpy is left out: {error}")
        products = operations(trajectories, context)
        for precision in PRECISIONS:
            ours = step_time(trajectories, context, precision=precision, repeats=repeats)
            for name, plain in others.items():
                record(
                    f"training step, K = {context}, {precision}",
                    1e3 * ours,
                    "ms",
                    1e3 * plain,
                    name,
                )
            record(
                f"  its share of the {precision} matrix peak",
                100 * products / ours / peaks[precision],
                "%",
            )


def operations(trajectories: data.Trajectories, context: int, batch: int = 64) -> int:
    """Floating-point operations of the matrix products of a training step, counted by torch."""
    sampler = data.WindowSampler(trajectories, context, HOPPER.return_scale, DEVICE)
    model = build_model("random", SIZE, HOPPER, seed=0, dropout=(0.0, 0.0, 0.0)).to(DEVICE)
    windows = sampler.windows(torch.arange(batch, device=DEVICE))
    with FlopCounterMode(display=False) as counter:
        action_loss(predict(model, windows), windows).backward()
    return counter.get_total_flops()


def physics(threads: int, count: int = 100, steps: int = 150) -> None:
    """Without a model: ours, gymnasium's loop, and mujoco.rollout."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, count, HOPPER.action_dim))
    ours = Environments(HOPPER, list(range(count)), threads)
    plain = [HOPPER.make_environment().unwrapped for _ in range(10)]
    model, full = plain[0].model, mujoco.mjtState.mjSTATE_FULLPHYSICS
    state = np.empty((count, mujoco.mj_stateSize(model, full)))
    for i, row in enumerate(state):
        plain[i % 10].reset(seed=i)
        mujoco.mj_getState(model, plain[i % 10].data, row, full)
    controls = actions.transpose(1, 0, 2).repeat(plain[0].frame_skip, axis=1)
    with mujoco.rollout.Rollout(nthread=threads) as pool:
        alone = seconds(
            lambda: pool.rollout(
                model, [mujoco.MjData(model) for _ in range(threads)], state, controls
            )
        )
    together = seconds(lambda: [ours.step(np.arange(count), row) for row in actions])
    one = seconds(
        lambda: [environment.step(row[i]) for row in actions for i, environment in enumerate(plain)]
    )
    rate, what = (
        count * steps / together,
        f"physics, {count} Hoppers, {threads} thread{'s' * (threads > 1)}",
    )
    record(
        what,
        rate,
        "steps/s",
        count * steps / alone,
        f"mujoco.rollout, {threads} thread{'s' * (threads > 1)}",
    )
    record(what, rate, "steps/s", 10 * steps / one, "gymnasium, one thread")


def rollouts(context: int, count: int = 100, horizon: int = 100) -> None:
    """A hundred episodes of HalfCheetah at once, against one after the other."""
    mean, std = np.zeros(CHEETAH.state_dim, np.float32), np.ones(CHEETAH.state_dim, np.float32)
    model = build_model("random", SIZE, CHEETAH, seed=0).to(DEVICE)
    took = seconds(
        lambda: rollout(
            model,
            CHEETAH,
            mean,
            std,
            target_return=6000,
            episodes=count,
            context=context,
            seed=0,
            horizon=horizon,
        )
    )
    plain = baselines.evaluate(
        baselines.make_model(CHEETAH, *SIZES[SIZE], "eager").to(DEVICE),
        mean,
        std,
        CHEETAH,
        context,
        episodes=5,
        device=DEVICE,
        horizon=horizon,
    )
    record(
        f"rollout, {count} HalfCheetahs, K = {context}",
        count * horizon / took,
        "steps/s",
        plain[0] / plain[1],
        "one at a time",
    )


def whole_run(what: str, **settings: object) -> runs.Run:
    """A run from data to checkpoint, against plain loops of as many training and environment steps.

    Their time follows from their speed over a few steps. On a CPU each has one thread.
    """
    config = runs.RunConfig(precision=PRECISIONS[-1], **settings)
    trajectories, threads, finished = load_data(config), torch.get_num_threads(), []
    ours = seconds(lambda: finished.append(runs.fine_tune(config, DEVICE)))
    taken = sum(sum(row["lengths"]) for row in finished[0].metrics)
    torch.set_num_threads(1 if DEVICE == "cpu" else threads)
    model = baselines.make_model(HOPPER, *SIZES[config.size][:2], 1, "eager").to(DEVICE)
    step = (
        seconds(
            lambda: baselines.train(
                model, trajectories, HOPPER, config.context, 5, config.batch_size, DEVICE
            ),
            3,
        )
        / 5
    )
    scaling = trajectories.state_mean, trajectories.state_std
    steps, took = baselines.evaluate(model, *scaling, HOPPER, config.context, 10, DEVICE)
    plain = config.epochs * config.steps_per_epoch * step + taken * took / steps
    record(
        f"{what} ({taken:,} environment steps)", ours, "s", plain, "plain loops, from their speed"
    )
    torch.set_num_threads(threads)
    return finished[0]


def growth(trajectories: data.Trajectories) -> pd.DataFrame:
    """Milliseconds of a training step as one thing grows; K = 20, batch 16, 4 blocks of 128."""
    found = []
    for what, values in (
        ("K", (1, 5, 10, 20, 40)),
        ("batch", (4, 8, 16, 32, 64)),
        ("width", (64, 128, 256, 512)),
        ("blocks", (1, 2, 4, 8, 16)),
    ):
        for value in values:
            chosen = {"K": 20, "batch": 16, "width": 128, "blocks": 4} | {what: value}
            SIZES["this"] = (chosen["blocks"], chosen["width"], 4)
            took = step_time(trajectories, chosen["K"], chosen["batch"], "this", repeats=4)
            found.append({"grows": what, "value": value, "milliseconds": 1e3 * took})
    return pd.DataFrame(found)


def parts(trajectories: data.Trajectories, run: runs.Run) -> list[dict]:
    """Seconds of a finished run's parts, divided as a few steps of its model are."""
    config, threads = run.config, torch.get_num_threads()
    spent = dict.fromkeys(("rollouts: model", "rollouts: physics"), 0.0)
    torch.set_num_threads(1 if DEVICE == "cpu" else threads)
    sampler = data.WindowSampler(trajectories, config.context, HOPPER.return_scale, DEVICE)
    model = run.load_model().to(DEVICE)
    optimiser = make_optimiser(model, 0.0)
    starts = torch.randint(sampler.number_of_steps, (config.batch_size,)).to(DEVICE)
    windows = sampler.windows(starts)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()

    def timed(name: str, action: Callable) -> Callable:
        def call(*arguments: object) -> object:
            began = time.perf_counter()
            result = action(*arguments)
            spent[name] += time.perf_counter() - began
            return result

        return call

    forward = seconds(lambda: action_loss(predict(model, windows), windows), 30)
    both = seconds(lambda: action_loss(predict(model, windows), windows).backward(), 30)
    training = {
        "windows": seconds(lambda: sampler.windows(starts), 30),
        "forward": forward,
        "backward": both - forward,
        "clipping, AdamW": seconds(update, 30),
    }
    model.act = timed("rollouts: model", model.act)
    with patch.object(Environments, "step", timed("rollouts: physics", Environments.step)):
        whole = seconds(
            lambda: rollout(
                model,
                HOPPER,
                *run.statistics(),
                target_return=3600,
                context=config.context,
                seed=0,
                episodes=config.evaluation_episodes,
            )
        )
    evaluation = spent | {"rollouts: rest": whole - sum(spent.values())}
    torch.set_num_threads(threads)
    taken = run.record["provenance"]["seconds"]
    return [
        {"run": f"K = {config.context}", "part": part, "seconds": taken[kind] * value / total}
        for kind, own in (("training", training), ("evaluation", evaluation))
        for total in [sum(own.values())]
        for part, value in own.items()
    ]


def draw_parts(table: pd.DataFrame) -> None:
    """A stacked bar for each run."""
    shares = table.pivot(index="run", columns="part", values="seconds")[table.part.unique()]
    figure, ax = plt.subplots(figsize=(7.0, 2.2))
    left, names = (
        np.zeros(len(shares)),
        ("markov", "gpt2", "random-matched", "data", "igpt-native", "igpt", "iid"),
    )
    for part, name in zip(shares, names, strict=True):
        ax.barh(
            np.arange(len(shares)), shares[part], left=left, color=figures.COLOURS[name], label=part
        )
        left += shares[part].to_numpy()
    ax.set_yticks(np.arange(len(shares)), shares.index)
    ax.set_xlabel(
        f"seconds of one laptop run, 600 steps and 4 evaluations of 8 episodes ({DEVICE})"
    )
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(HERE / "parts.png", dpi=200)


def whole_numbers(axis: Axis) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def draw(table: pd.DataFrame, grown: pd.DataFrame) -> None:
    figures.use_style()
    ratios = table.dropna(subset="ratio")[::-1]
    figure, ax = plt.subplots(figsize=(7.0, 0.5 + 0.26 * len(ratios)))
    ax.barh(np.arange(len(ratios)), ratios.ratio - 1, left=1, color=figures.COLOURS["gpt2"])
    for y, ratio in enumerate(ratios.ratio):
        ax.text(max(ratio, 1) * 1.05, y, f"{ratio:.2f}", va="center", fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(
        np.arange(len(ratios)),
        [f"{row.what}\nagainst {row.against}" for row in ratios.itertuples()],
        fontsize=7,
    )
    ax.set(
        xlabel=f"times as fast ({platform.machine()}, {os.cpu_count()} cores, {DEVICE})",
        xscale="log",
    )
    whole_numbers(ax.xaxis)
    ax.margins(x=0.1)
    figure.savefig(HERE / "ratios.png", dpi=200)
    figure, axes = plt.subplots(1, 4, figsize=(7.0, 2.2), sharey=True)
    for ax, (what, part) in zip(axes, grown.groupby("grows", sort=False), strict=True):
        ax.plot(part.value, part.milliseconds, "o-", color=figures.COLOURS["gpt2"])
        slope = np.polyfit(np.log(part.value[-3:]), np.log(part.milliseconds[-3:]), 1)[0]
        ax.set(xscale="log", yscale="log", xlabel=what, title=f"slope at the end: {slope:.1f}")
        ax.set_xticks(part.value, part.value)
        ax.xaxis.set_minor_locator(NullLocator())
    whole_numbers(axes[0].yaxis)
    axes[0].set_ylabel("training step, ms")
    figure.savefig(HERE / "growth.png", dpi=200)


def main() -> None:
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else platform.processor() or platform.machine(),
        "bfloat16": "bfloat16" in PRECISIONS,
        "size": SIZE,
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "mujoco", "gymnasium", "numpy")
        },
    }
    print(json.dumps(machine, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DTLIB_CACHE"] = folder
        trajectories = stages()
        training(trajectories)
        for threads in sorted({1, os.cpu_count() or 1}):
            physics(threads)
        for context in (20, 1):
            rollouts(context)
        grown = growth(trajectories)
        for context in (1, 20):
            whole_run(
                f"10 × 100 steps, 11 evaluations, K = {context}",
                size=SIZE,
                context=context,
                epochs=10,
                steps_per_epoch=100,
                warmup_steps=100,
                evaluation_episodes=20,
            )
        laptop = dict(
            size="mini",
            epochs=3,
            steps_per_epoch=200,
            warmup_steps=50,
            learning_rate_decay=True,
            dropout=(0.0, 0.0, 0.0),
            time_embedding_std=0.02,
            evaluation_episodes=8,
        )
        ends = [
            whole_run(
                "one run of notebook 00, laptop profile",
                batch_size=16,
                learning_rate=1e-3,
                **laptop,
            ),
            whole_run(
                "one run of notebook 05, laptop profile",
                context=1,
                batch_size=64,
                learning_rate=3e-4,
                **laptop,
            ),
        ]
        table_of_parts = pd.DataFrame([row for run in ends for row in parts(trajectories, run)])
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "results.csv", index=False, float_format="%.4g")
    grown.to_csv(HERE / "growth.csv", index=False, float_format="%.4g")
    (HERE / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    table_of_parts.to_csv(HERE / "parts.csv", index=False, float_format="%.4g")
    draw(table, grown)
    draw_parts(table_of_parts)


if __name__ == "__main__":
    main()
