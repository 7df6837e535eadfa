"""A fine-tuning run on disk: a config goes in, checkpoints and metrics come out."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dtlib import records, storage
from dtlib.build import Parts, build, draw_rows, load_data
from dtlib.config import RunConfig
from dtlib.controls import swap_block
from dtlib.errors import UserError, explained, reading
from dtlib.evaluate import rollout
from dtlib.model import DecisionTransformer
from dtlib.parallel import one_thread, run_all
from dtlib.seeding import stream_seed
from dtlib.starts import blank_model
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
        kinds = OSError, ValueError, TypeError, KeyError, AttributeError
        advice = "move that folder away and run again"
        with explained(f"The run in {path} is damaged", advice, *kinds), reading():
            config, record = records.read_record(path)
            return cls(config, path, record, record["metrics"])

    @property
    def stands_still(self) -> bool:
        """Whether the last epoch left the action error as it was, in every digit."""
        errors = [row["action_error"] for row in self.metrics]
        return len(errors) > 1 and errors[-1] == errors[-2]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (S,) float32 that standardise the model's states."""
        known = self.record["data"]
        return tuple(np.array(known[name], np.float32) for name in ("state_mean", "state_std"))

    def load_model(self, epoch: int | None = None) -> DecisionTransformer:
        """Return the model after ``epoch`` (0: the start; None: the last), to evaluate on the CPU.

        Raises UserError for an epoch that was not kept and for a file that was changed.
        """
        path = self.path / records.checkpoint_name(self.config.epochs if epoch is None else epoch)
        known = self.record["checkpoints"]
        if path.name not in known:
            raise UserError(f"{self.path} has no {path.name}: choose one of {', '.join(known)}.")
        advice = "move its folder away and run again"
        with explained(f"{path} was changed or removed", advice, OSError, ValueError), reading():
            if storage.digest(path) != known[path.name]:
                raise ValueError("its checksum is another one")
        model = self._empty_model(self.record["backbone"])
        if self.record["donor"] is not None:  # its block has its own heads and activation
            swap_block(model, self._empty_model(self.record["donor"]), self.config.swapped_block)
        load_checkpoint(model, path)
        return model.eval()

    def _empty_model(self, backbone: dict) -> DecisionTransformer:
        return blank_model(get_task(self.config.task), backbone, self.config.action_head)


def fine_tuned(
    configs: list[RunConfig], device: str = "auto", processes: int | None = None
) -> list[Run]:
    """Return the finished runs of ``configs``, in order. Missing ones are trained, several at once.

    Each takes one core or card, or one of Dask's workers (see parallel.run_all). Ctrl-C leaves
    every run resumable from its last finished epoch. Raises UserError if the device is absent, the
    data cannot be loaded, a training diverges, or a finished run learnt from other data or text.
    """
    fingerprints, folders, missing = {}, {}, []
    for config in dict.fromkeys(configs):
        records.fetch_weights(config)  # names depend on them, and on data that are downloaded
        source = config.task, config.dataset, config.dataset_steps, config.delayed_rewards
        if source not in fingerprints:
            fingerprints[source] = load_data(config).fingerprint
        folders[config] = folder = records.run_folder(config)
        if not folder.exists():
            missing.append(config)
        else:
            records.check_source(config, Run.open(folder).record, fingerprints[source], folder)
    steps = sum(config.epochs * config.steps_per_epoch for config in missing)
    about = f"fine-tuning {len(missing)} runs"
    run_all(fine_tune, missing, steps, about, device, processes)
    runs = [Run.open(folders[config]) for config in configs]
    records.say_other_code({run.path.name: run.record for run in runs})
    records.say_still([run.path.name for run in runs if run.stands_still], len(runs))
    return runs


def fine_tune(
    config: RunConfig, device: str = "cpu", on_steps: OnSteps = lambda steps: None
) -> Run:
    """Return the finished run of ``config``: loaded, resumed if it was interrupted, or trained.

    Of several processes that ask for one run, one trains and the others wait. A run appears under
    its name only when it is whole; until then it grows in ``.partial``.
    """
    final = records.run_folder(config)
    cards = [torch.cuda.current_device()] if device == "cuda" else []
    with storage.growing(final) as folder:
        if folder is None:
            on_steps(config.epochs * config.steps_per_epoch)
        # Otherwise the record is written and the state is gone: only the rename is missing.
        elif not (folder / "run.json").exists() or (folder / "resume.safetensors").exists():
            with one_thread(device), torch.random.fork_rng(cards):
                train_run(config, folder, device, on_steps)
    return Run.open(final)


def train_run(config: RunConfig, folder: Path, device: str, on_steps: OnSteps) -> None:
    """Train in ``folder``, from the last finished epoch if there is one, and write its record."""
    parts, found = build(config, device), records.digests(config)
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
            path = folder / records.checkpoint_name(epoch)
            storage.write_tensors(path, plain_state(parts.model))
        return row

    new = {"metrics": [], "seconds": {"training": 0, "evaluation": 0}}
    new |= {"name": folder.name, "fingerprint": parts.trajectories.fingerprint}
    if config.cotraining:
        new["fingerprint"] += parts.further_loss.text.facts["sha256"]
        new["text"] = records.text_identity(records.corpus_of(config))
    given = new, "metrics", config.epochs + 1, advance, on_steps
    progress = storage.resumable(folder, parts.model, parts.optimiser, *given)
    records.write_record(folder, config, found, parts, progress, device)
    (folder / "resume.safetensors").unlink()


def _train_one_epoch(config: RunConfig, parts: Parts, epoch: int, on_steps: OnSteps) -> float:
    torch.manual_seed(stream_seed(config.seed, "dropout", epoch))
    total = config.epochs * config.steps_per_epoch
    shape = "decay" if config.learning_rate_decay else "constant"
    return train_epoch(
        parts.model,
        parts.optimiser,
        parts.sampler,
        draw_rows(config, parts, epoch),
        rate=lambda step: learning_rate_at(
            step, config.learning_rate, config.warmup_steps, total, shape
        ),
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
    row = {
        "epoch": epoch,
        "step": epoch * config.steps_per_epoch,
        "training_loss": loss,
        "action_error": action_error(parts.model, parts.sampler, parts.validation_rows),
        "returns": episodes.returns.tolist(),
        "lengths": episodes.lengths.tolist(),
    }
    if not np.isfinite([row["action_error"], *row["returns"]]).all():
        advice = "choose a target_return nearer to the data's, or a lower learning_rate"
        raise UserError(f"After epoch {epoch} actions or returns are not finite: {advice}.")
    return row
