"""A fine-tuning run on disk: a config goes in, checkpoints and metrics come out."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dtlib import storage
from dtlib.build import Parts, build, draw_rows, load_data
from dtlib.config import RunConfig
from dtlib.controls import swap_block
from dtlib.errors import UserError
from dtlib.evaluate import rollout
from dtlib.model import DecisionTransformer
from dtlib.parallel import one_thread, run_all
from dtlib.records import (
    checkpoint_name,
    digests,
    fetch_weights,
    read_record,
    run_folder,
    write_record,
)
from dtlib.seeding import stream_seed
from dtlib.starts import blank_model
from dtlib.storage import digest
from dtlib.tasks import get_task
from dtlib.train import action_error, learning_rate_at, train_epoch
from dtlib.weights import load_checkpoint
from dtlib.wikipedia.losses import plain_state

OnSteps = Callable[[int], None]  # called with the number of training steps that were just done


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. ``metrics`` has one dict per epoch; epoch 0 is the starting point.

    Its keys: epoch, step, training_loss (mean over the epoch, with dropout; None at 0),
    action_error (without dropout), returns and lengths (one per episode). ``record`` also holds
    data (fingerprint, summary, state_mean, state_std) and provenance (device, versions, seconds).
    """

    config: RunConfig
    path: Path
    record: dict
    metrics: list[dict]

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a finished run's folder. Raises UserError if it was changed."""
        try:
            config, record = read_record(path)
            return cls(config, path, record, record["metrics"])
        except (OSError, ValueError, TypeError, KeyError, UserError) as error:
            raise UserError(
                f"The run in {path} is damaged ({error}): move that folder away and run again."
            ) from error

    def refuse_other_data(self, fingerprint: str) -> None:
        """Raise UserError unless the run learnt from the data of ``fingerprint``."""
        if self.record["data"]["fingerprint"] != fingerprint:
            raise UserError(
                f"The run in {self.path} learnt from other data than {self.config.dataset!r} has "
                "now: bring the old data back, or move that folder away to train on the new data."
            )

    @property
    def stands_still(self) -> bool:
        """Whether the last epoch changed no prediction: every action is ±1, the gradient 0."""
        *_, before, last = [None, *(row["action_error"] for row in self.metrics)]
        return before == last

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (S,) float32 that standardise the model's states."""
        known = self.record["data"]
        return tuple(np.array(known[name], np.float32) for name in ("state_mean", "state_std"))

    def load_model(self, epoch: int | None = None) -> DecisionTransformer:
        """Return the model after ``epoch`` (0: the start; None: the last), to evaluate on the CPU.

        Raises UserError for an epoch that was not kept and for a file that was changed.
        """
        path = self.path / checkpoint_name(self.config.epochs if epoch is None else epoch)
        known = self.record["checkpoints"]
        if path.name not in known:
            raise UserError(f"{self.path} has no {path.name}: choose one of {', '.join(known)}.")
        if not path.is_file() or digest(path) != known[path.name]:
            raise UserError(f"{path} was changed or removed: move its folder away and run again.")
        model = self._empty_model(self.record["backbone"])
        if self.record["donor"] is not None:
            swap_block(model, self._empty_model(self.record["donor"]), self.config.swapped_block)
        load_checkpoint(model, path)
        return model.eval()

    def _empty_model(self, backbone: dict) -> DecisionTransformer:
        return blank_model(get_task(self.config.task), backbone, self.config.action_head)


def fine_tuned(
    configs: list[RunConfig],
    device: str = "auto",
    processes: int | None = None,
    progress: bool = True,
) -> list[Run]:
    """Return the finished runs of ``configs``, in order. Missing ones are trained, several at once.

    Each takes one core or card, or one of Dask's workers (see parallel.run_all). Ctrl-C leaves
    every run resumable from its last finished epoch. Raises UserError if the device is absent, the
    data cannot be loaded, a training diverges, or a finished run learnt from other data.
    """
    prints = {}
    for config in configs:  # collected or downloaded once: names depend on it
        fetch_weights(config)
        if (key := _data_of(config)) not in prints:
            prints[key] = load_data(config, progress).fingerprint
    folders = {config: run_folder(config) for config in configs}
    missing = [config for config, folder in folders.items() if not folder.exists()]
    for config in folders.keys() - {*missing}:
        Run.open(folders[config]).refuse_other_data(prints[_data_of(config)])
    run_all(
        fine_tune,
        missing,
        total=sum(config.epochs * config.steps_per_epoch for config in missing),
        description=f"fine-tuning {len(missing)} runs",
        device=device,
        processes=processes,
        progress=progress and bool(missing),
    )
    runs = [Run.open(folders[config]) for config in configs]
    if still := [run.path.name for run in runs if run.stands_still]:
        print(
            f"{len(still)} of {len(runs)} runs stand still: every action is ±1 and the gradient 0. "
            f"Try a lower learning_rate or action_head=separate. First: {still[0]}."
        )
    return runs


def _data_of(config: RunConfig) -> tuple:
    return config.task, config.dataset, config.dataset_steps, config.delayed_rewards


def fine_tune(
    config: RunConfig, device: str = "cpu", on_steps: OnSteps = lambda steps: None
) -> Run:
    """Return the finished run of ``config``: loaded, resumed if it was interrupted, or trained.

    Of several processes that ask for one run, one trains and the others wait. A run appears under
    its name only when it is whole; until then it grows in ``.partial``.
    """
    final = run_folder(config)
    cards = [torch.cuda.current_device()] if device == "cuda" else []
    with storage.growing(final) as folder:
        if folder is None:
            on_steps(config.epochs * config.steps_per_epoch)
        # If the record is written and the state is gone, only the rename is missing.
        elif not (folder / "run.json").exists() or (folder / "resume.safetensors").exists():
            with one_thread(device), torch.random.fork_rng(cards):
                train_run(config, folder, device, on_steps)
    return Run.open(final)


def train_run(config: RunConfig, folder: Path, device: str, on_steps: OnSteps) -> None:
    """Train in ``folder``, from the last finished epoch if there is one, and write its record."""
    parts, found = build(config, device), digests(config)
    if folder.name != config.name(found):
        raise UserError(f"A file that {folder.name} is made from changed meanwhile: run again.")

    def advance(epoch: int, progress: dict) -> dict:
        began, seconds = time.perf_counter(), progress["seconds"]
        loss = _train_one_epoch(config, parts, epoch, on_steps) if epoch else None
        trained = time.perf_counter()
        row = _measure(config, parts, epoch, loss)
        seconds["training"] += trained - began
        seconds["evaluation"] += time.perf_counter() - trained
        if epoch in (0, config.epochs, *config.checkpoints):
            storage.write_tensors(folder / checkpoint_name(epoch), plain_state(parts.model))
        return row

    new = {"metrics": [], "seconds": {"training": 0, "evaluation": 0}}
    progress = storage.resumable(
        folder,
        parts.model,
        parts.optimiser,
        new=new | {"fingerprint": parts.trajectories.fingerprint},
        rows="metrics",
        count=config.epochs + 1,
        advance=advance,
        on_steps=on_steps,
    )
    write_record(folder, config, found, parts, progress, device)
    (folder / "resume.safetensors").unlink()


def _train_one_epoch(config: RunConfig, parts: Parts, epoch: int, on_steps: OnSteps) -> float:
    torch.manual_seed(stream_seed(config.seed, "dropout", epoch))
    rate = functools.partial(
        learning_rate_at,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.epochs * config.steps_per_epoch,
        shape="decay" if config.learning_rate_decay else "constant",
    )
    return train_epoch(
        parts.model,
        parts.optimiser,
        parts.sampler,
        draw_rows(config, parts, epoch),
        rate=rate,
        first_step=(epoch - 1) * config.steps_per_epoch,
        gradient_clip=config.gradient_clip,
        precision=config.precision,
        further_loss=parts.further_loss,
        on_step=lambda: on_steps(1),
    )


def _measure(config: RunConfig, parts: Parts, epoch: int, loss: float | None) -> dict:
    """Return the metrics after ``epoch``. Its episodes come from the epoch's own stream."""
    episodes = rollout(
        parts.model,
        parts.task,
        parts.trajectories.state_mean,
        parts.trajectories.state_std,
        target_return=config.target_return,
        episodes=config.evaluation_episodes,
        context=config.context,
        seed=stream_seed(config.seed, "evaluation of epoch", epoch),
        delayed=config.delayed_rewards,
    )
    return {
        "epoch": epoch,
        "step": epoch * config.steps_per_epoch,
        "training_loss": loss,
        "action_error": action_error(parts.model, parts.sampler, parts.validation_rows),
        "returns": episodes.returns.tolist(),
        "lengths": episodes.lengths.tolist(),
    }
