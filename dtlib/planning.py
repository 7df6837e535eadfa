"""What a batch costs here: runs are counted, and a few real steps of each kind of run are timed."""

import os
from collections import defaultdict
from dataclasses import replace
from unittest.mock import patch

import joblib
import torch

from dtlib.config import RunConfig
from dtlib.devices import choose_device
from dtlib.errors import UserError
from dtlib.records import run_folder
from dtlib.runs import fine_tune
from dtlib.storage import cache_root, temporary_folder
from dtlib.tasks import get_task

# What a timed run does not have; Hopper falls at once, so that its episodes are short.
PLAIN = {"task": "hopper", "dataset": "collected:random", "dataset_steps": 2000, "epochs": 1}
PLAIN |= {"initialisation": "random-matched", "donor": None, "words": None, "reset_heads": ()}
PLAIN |= {"alignment": 0.0, "cotraining": 0.0, "extended_positions": False, "steps_per_epoch": 8}


def describe(profile: str, asked: list[RunConfig], points: list) -> str:
    """Return what the runs ``asked`` for, after pre-training ``points``, cost on this machine."""
    device, kinds, lines, hours, disk = choose_device("auto"), defaultdict(list), [], 0.0, 0.0
    beside = torch.cuda.device_count() or joblib.effective_n_jobs(-1)
    for config in filter(_is_new, asked):
        kinds[config.size, config.context, config.batch_size, config.precision].append(config)
    for kind, configs in kinds.items():
        step, turn, size = time_run(configs[0], device)
        steps = sum(config.epochs * config.steps_per_epoch for config in configs)
        own = (steps * step + turn * sum(map(_turns, configs))) / 3600
        own /= min(beside, len(configs))
        hours += own
        disk += size * sum(len({0, c.epochs, *c.checkpoints}) for c in configs) / 1e9
        text = "  {} runs of size {}, K = {}, batch {}, {}: {:,} steps of {:.0f} ms, {:.1f} hours"
        lines.append(text.format(len(configs), *kind, steps, 1000 * step, own))
    new = sum(map(len, kinds.values()))
    steps = sum(point.steps for point in points)
    before = f"{len(points)} new starting points ({steps:,} steps of pre-training)"
    cost = f"{hours:.1f} hours ({device}, {beside} at once) and {disk:.1f} GB"
    first = f"The {profile} profile asks for {len(asked)} runs, {new} of them new, after {before}."
    lines.append(f"New runs take {cost}, by a few steps timed here.")
    lines.append("Not counted: pre-training, paper B's losses, measures, runs chosen by results.")
    return "\n".join([first, *lines])


def time_run(config: RunConfig, device: str) -> tuple[float, float, int]:
    """Return seconds of a training step and of a step of all episodes, and bytes of its weights."""
    # A processor may not have the memory for a large batch.
    part = 8 if device == "cpu" and config.size in ("gpt2", "imagegpt") else 1
    config = replace(config, **PLAIN, batch_size=max(1, config.batch_size // part))
    cache_root().mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache_root()) as folder:
        with patch.dict(os.environ, DTLIB_CACHE=folder):
            for seed in range(2 if device == "cuda" else 1):  # a card's first steps are slow
                run = fine_tune(replace(config, seed=seed), device)
        seconds = run.record["provenance"]["seconds"]
        turns = sum(max(row["lengths"]) for row in run.metrics)
        size = sum(file.stat().st_size for file in run.path.glob("epoch_000*"))
    return part * seconds["training"] / config.steps_per_epoch, seconds["evaluation"] / turns, size


def _is_new(config: RunConfig) -> bool:
    try:
        return not run_folder(config).exists()
    except UserError:  # its starting point must be pre-trained first
        return True


def _turns(config: RunConfig) -> float:
    """Steps of all evaluations: half the horizon where a robot can fall."""
    task = get_task(config.task)
    return (config.epochs + 1) * task.horizon * (1 if task.name == "halfcheetah" else 0.5)
