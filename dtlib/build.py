"""From names to objects, once: the data, sampler, model, optimiser and losses of a run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtlib import data, train
from dtlib.config import RunConfig
from dtlib.model import DecisionTransformer
from dtlib.seeding import stream_seed
from dtlib.starts import build_model
from dtlib.tasks import Task, get_task
from dtlib.wikipedia import losses

VALIDATION_WINDOWS = 512
OPTIONS = ("dropout", "time_embedding_std", "donor", "swapped_block", "reset_heads", "action_head")


@dataclass
class Parts:
    """All objects of a run. A row, int64, is a window's first step in the data."""

    task: Task
    trajectories: data.Trajectories
    sampler: data.WindowSampler
    model: DecisionTransformer
    optimiser: torch.optim.Optimizer
    further_loss: losses.LanguageLosses | None  # paper B's
    validation_rows: Tensor  # (512,): the action error's windows, from all episodes
    train_rows: Tensor | None = None  # rows that the run learns from; None: all


def build(config: RunConfig, device: str) -> Parts:
    """Build the objects that ``config`` names. Raises UserError if one of them cannot be had."""
    task, trajectories = get_task(config.task), load_data(config, progress=False)
    sampler = data.WindowSampler(trajectories, config.context, task.return_scale, device)
    options = {name: getattr(config, name) for name in OPTIONS}
    model = build_model(config.initialisation, config.size, task, config.seed, **options)
    further_loss = losses.add_language(config, model, device)
    optimiser = train.make_optimiser(model, config.learning_rate)
    # The same windows for every run: seed 0, not the run's.
    rows = draw(stream_seed(0, "action error"), sampler.number_of_steps, VALIDATION_WINDOWS)
    parts = Parts(task, trajectories, sampler, model, optimiser, further_loss, rows.to(device))
    if config.data_fraction < 1:
        rows = trajectories.rows_of(config.data_fraction, config.seed)
        parts.train_rows = torch.from_numpy(rows)
    return parts


def load_data(config: RunConfig, progress: bool = True) -> data.Trajectories:
    """Return the run's trajectories, collected or downloaded on first use."""
    task = get_task(config.task)
    trajectories = data.load(config.dataset, task, steps=config.dataset_steps, progress=progress)
    return trajectories.delayed() if config.delayed_rewards else trajectories


def draw(seed: int, below: int, *shape: int) -> Tensor:
    """Draw row numbers on the CPU, so that every device gets the same."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def draw_rows(config: RunConfig, parts: Parts, epoch: int) -> Tensor:
    """Draw the first rows of an epoch's windows (steps, B) from the epoch's own stream."""
    known = parts.train_rows
    below = parts.sampler.number_of_steps if known is None else len(known)
    seed = stream_seed(config.seed, "batches", epoch)
    rows = draw(seed, below, config.steps_per_epoch, config.batch_size)
    return (rows if known is None else known[rows]).to(parts.validation_rows.device)
