"""A fine-tuning run on disk: a config goes in, checkpoints and metrics come out; asked for twice, it is trained once."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from tqdm import tqdm

from dtlib import data
from dtlib.errors import UserError, atomic_write, cache_root, checked, locked, sha256, versions
from dtlib.evaluate import rollout
from dtlib.language_losses import LanguageLosses, Words, add_adapters, extend_positions, freeze_blocks, plain_state
from dtlib.model import (
    CARRIERS,
    SIZES,
    DecisionTransformer,
    build_model,
    digest,
    get_initialisation,
    load_checkpoint,
    swap_block,
    weights_digest,
    weights_folder,
)
from dtlib.seeding import stream_seed
from dtlib.tasks import get_task
from dtlib.train import action_error, choose_device, load_state, make_optimiser, save_state, train_epoch, train_together
from dtlib.workers import one_thread, spread

Count, Whole = Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)]
Positive, Probability = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class RunConfig:
    """All that decides a run; by default paper A's setting, but for the data. Raises UserError for wrong names and values."""

    task: str = "hopper"
    dataset: str = "collected:medium"
    dataset_digest: str | None = None  # filled in, of a file's content
    dataset_steps: Count | None = None  # to collect (None: 100,000) or to read of a file (None: all)
    initialisation: str = "random"
    size: Literal[tuple(SIZES)] = "gpt2"  # of random weights and of those made here; others bring theirs
    context: Count = 20
    seed: Whole = 0
    epochs: Count = 40
    steps_per_epoch: Count = 2500
    batch_size: Count = 64
    learning_rate: Positive = 1e-4
    warmup_steps: Whole = 5000
    learning_rate_decay: bool = False  # linearly to 0 over the whole run; the papers keep the rate
    weight_decay: float = Field(1e-4, ge=0)
    adam_epsilon: Positive = 1e-8
    gradient_clip: Positive | None = 0.25  # None: no clipping
    dropout: Annotated[tuple[Probability, Probability, Probability], Field(strict=False)] = (0.2, 0.1, 0.1)  # see build_model
    time_embedding_std: float = Field(1.0, ge=0)  # see build_model
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False  # train through torch.compile
    target_return: float | None = None  # None: the task's first target
    evaluation_episodes: Count = 100
    checkpoints: Annotated[tuple[int, ...], Field(strict=False)] = ()  # epochs kept beside the first (0) and the last
    donor: str | None = None  # initialisation that gives one block, swapped_block
    swapped_block: Whole = 0
    reset_heads: Annotated[tuple[Whole, ...], Field(strict=False)] = ()  # of block 0, drawn anew
    # Paper B's additions: see dtlib/language_losses.py
    alignment: float = Field(0.0, ge=0)  # λ₁, 0.1 in the paper
    alignment_steps: Positive = 5000.0  # until the alignment has faded; 15,000 with co-training [code]
    alignment_reduction: Literal["max", "mean", "as released"] = "max"
    cotraining: float = Field(0.0, ge=0)  # λ₂, 1 in the paper (0.1 in half precision)
    cotraining_corpus: str = ""  # see corpora.language; empty: what the language model learnt from
    words: str | None = None  # initialisation whose word table both take; None: the run's own
    extended_positions: bool = False
    frozen_blocks: bool = False
    adapter_rank: Whole = 0  # of low-rank adapters to frozen blocks; 0: none
    data_fraction: float = Field(1.0, gt=0, le=1)  # of the episodes, drawn from the seed
    delayed_rewards: bool = False  # the whole return at an episode's end
    starting_weights: str | None = None  # filled in: see _digests

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: object, build: Callable) -> "RunConfig":
        config = checked(cls, values, build)
        if config.starting_weights is None:
            object.__setattr__(config, "starting_weights", _digests(config))
        if config.dataset_digest is None and (path := Path(config.dataset).expanduser()).is_file():
            object.__setattr__(config, "dataset_digest", digest(path))
        if config.target_return is None:
            object.__setattr__(config, "target_return", get_task(config.task).targets[0])
        return config

    @property
    def name(self) -> str:
        """Folder name: readable first, then the hash of the config that makes it unique.

        Of what differs from the defaults, so that a field added one day leaves the runs of today their names.
        """
        fields = type(self).__pydantic_fields__
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value != fields[name].default}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}-{Path(self.initialisation).name}-K{self.context}-seed{self.seed}-{digest}"


def _digests(config: RunConfig) -> str:
    names = filter(None, (config.initialisation, config.donor, config.words))
    return "+".join(weights_digest(name, config.size, config.seed) for name in names)


def runs_root() -> Path:
    return cache_root() / "runs"


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in record.items() if k != "checksum"}).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. ``metrics`` has one dict per epoch, epoch 0 being the starting point: epoch, step, training_loss (mean
    over the epoch, dropout on; None at 0), action_error (dropout off), returns and lengths (one per episode). ``record``
    holds all there is: also data (fingerprint, summary, state_mean, state_std) and provenance (device, versions, seconds)."""

    config: RunConfig
    path: Path
    record: dict
    metrics: list[dict]

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a finished run's folder. Raises UserError if what it holds was changed, or belongs elsewhere."""
        try:
            record = json.loads((path / "run.json").read_text())
            config = RunConfig(**record["config"])
            if record["checksum"] != _checksum(record) or config.name != path.name:
                raise ValueError("run.json was changed")
            return cls(config, path, record, record["metrics"])
        except (OSError, ValueError, TypeError, KeyError, UserError) as error:
            raise UserError(f"The run in {path} is damaged ({error}): delete that folder and run again.") from error

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (S,) float32 of the training data's states, which standardise the model's input."""
        return tuple(np.array(self.record["data"][name], np.float32) for name in ("state_mean", "state_std"))

    def load_model(self, epoch: int | None = None) -> DecisionTransformer:
        """The model in evaluation mode on the CPU after ``epoch`` (0: the starting point; None: the last)."""
        path = self.path / f"epoch_{self.config.epochs if epoch is None else epoch:03d}.safetensors"
        digests = self.record["checkpoints"]
        if path.name not in digests:
            raise UserError(f"{self.path.name} has no {path.name}: choose one that it keeps, {', '.join(digests)}.")
        if not path.is_file() or sha256(path) != digests[path.name]:
            raise UserError(f"{path} was changed or removed: delete its folder and run again.")
        model, *donor = (DecisionTransformer(get_task(self.config.task), CARRIERS[config["model_type"]][0].from_dict(config))
                         for config in (self.record["backbone"], self.record["donor"]) if config is not None)
        if donor:
            swap_block(model, *donor, self.config.swapped_block)
        load_checkpoint(model, path)
        return model.eval()


def load_data(config: RunConfig, progress: bool = True) -> data.Trajectories:
    """The run's trajectories (collected or downloaded on first use)."""
    trajectories = data.load(config.dataset, get_task(config.task), steps=config.dataset_steps, progress=progress)
    return trajectories.delayed() if config.delayed_rewards else trajectories


def _with_language(config: RunConfig, model: DecisionTransformer, device: str) -> LanguageLosses | None:
    """Make ``model`` (moved to ``device``) as the config's part of paper B says; return what is added to its loss."""
    words = None
    if config.alignment or config.cotraining or config.extended_positions:
        name = config.words or config.initialisation
        if (folder := weights_folder(get_initialisation(name), config.size, config.seed)) is None:
            raise UserError(f"{name!r} has no word table: name an initialisation that has one, such as words='language'.")
        words = Words(folder)
        if words.wte.shape[1] != model.config.hidden_size:
            raise UserError(f"The word table of {name!r} has width {words.wte.shape[1]}, the model has "
                            f"{model.config.hidden_size}: take two of one size.")
    if config.extended_positions:
        extend_positions(model, words.wpe.detach())
    if config.adapter_rank:
        add_adapters(model, config.adapter_rank)
    elif config.frozen_blocks:
        freeze_blocks(model)
    if config.cotraining:
        model.words = words  # learns with the rest
    model.to(device)
    if not (config.alignment or config.cotraining):
        return None
    return LanguageLosses(
        model, words.to(device), folder, alignment=config.alignment, alignment_steps=config.alignment_steps,
        alignment_reduction=config.alignment_reduction, cotraining=config.cotraining,
        cotraining_corpus=config.cotraining_corpus, seed=config.seed)


class Epoch(NamedTuple):
    """What a run waits for: the arguments of ``train_epoch``, whose loss it is sent."""

    model: torch.nn.Module
    optimiser: torch.optim.Optimizer
    sampler: data.WindowSampler
    starts: torch.Tensor
    further_loss: LanguageLosses | None
    settings: dict


def _train(config: RunConfig, folder: Path, device: str, on_steps: Callable[[int], None]) -> Generator[Epoch, float, None]:
    """Train in ``folder``, from its last finished epoch if there is one, and leave run.json and the checkpoints there.

    Epochs are yielded, for the caller to train alone or together with other runs'.
    """
    task, trajectories = get_task(config.task), load_data(config, progress=False)
    sampler = data.WindowSampler(trajectories, config.context, task.return_scale, device)
    if config.starting_weights != _digests(config):
        raise UserError(f"The weights of {config.initialisation!r} changed since this run was asked for: ask for it anew.")
    model = build_model(config.initialisation, config.size, task, config.seed, config.dropout, config.time_embedding_std,
                        config.donor, config.swapped_block, config.reset_heads)
    further_loss = _with_language(config, model, device)
    donor = None if config.donor is None else model.h[config.swapped_block].attn.config.to_dict()
    # Rollouts meet many shapes and stay eager; both share the parameters.
    training_model = torch.compile(model) if config.compile else model
    optimiser = make_optimiser(model, config.learning_rate, config.weight_decay, config.adam_epsilon)

    def draw(seed: int, size: int, *shape: int) -> torch.Tensor:
        # Windows' starts, drawn on the CPU, so that every device gets the same.
        return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))

    # The same windows for every model on a data set, even where it learns from a part of that.
    fixed = draw(stream_seed(0, "action error"), sampler.number_of_steps, 512).to(device)
    rows = torch.from_numpy(trajectories.rows_of(config.data_fraction, config.seed)) if config.data_fraction < 1 else None
    state = folder / "resume.safetensors"
    progress = {"fingerprint": trajectories.fingerprint, "metrics": [], "seconds": {"training": 0.0, "evaluation": 0.0}}
    if state.exists():
        progress = load_state(state, model, optimiser)
        if progress["fingerprint"] != trajectories.fingerprint:
            raise UserError(f"{config.dataset!r} has other data than when {folder} was begun: delete that folder.")
        on_steps(progress["metrics"][-1]["step"])
    for epoch in range(len(progress["metrics"]), config.epochs + 1):
        # Streams are made anew for every epoch, so a resumed run needs no generator's state.
        loss, step, began = None, epoch * config.steps_per_epoch, time.perf_counter()
        if epoch > 0:
            torch.manual_seed(stream_seed(config.seed, "dropout", epoch))
            starts = draw(stream_seed(config.seed, "batches", epoch), sampler.number_of_steps if rows is None else len(rows),
                          config.steps_per_epoch, config.batch_size)
            starts = (starts if rows is None else rows[starts]).to(device)
            loss = yield Epoch(training_model, optimiser, sampler, starts, further_loss, dict(
                first_step=step - config.steps_per_epoch, learning_rate=config.learning_rate,
                warmup_steps=config.warmup_steps, gradient_clip=config.gradient_clip, precision=config.precision,
                total_steps=config.epochs * config.steps_per_epoch if config.learning_rate_decay else None))
        trained = time.perf_counter()
        episodes = rollout(model, task, trajectories.state_mean, trajectories.state_std, target_return=config.target_return,
                           episodes=config.evaluation_episodes, context=config.context,
                           seed=stream_seed(config.seed, "evaluation of epoch", epoch), delayed=config.delayed_rewards)
        progress["metrics"].append({
            "epoch": epoch, "step": step, "training_loss": loss, "action_error": action_error(model, sampler, fixed),
            "returns": episodes.returns.tolist(), "lengths": episodes.lengths.tolist()})
        progress["seconds"]["training"] += trained - began
        progress["seconds"]["evaluation"] += time.perf_counter() - trained
        if epoch in (0, config.epochs, *config.checkpoints):
            with atomic_write(folder / f"epoch_{epoch:03d}.safetensors") as temporary:
                save_file(plain_state(model), temporary)
        save_state(state, model, optimiser, progress)
    record = {
        "config": dataclasses.asdict(config), "backbone": model.config.to_dict(), "donor": donor,
        "metrics": progress["metrics"],
        "data": {"fingerprint": trajectories.fingerprint, "summary": trajectories.summary(),
                 "state_mean": trajectories.state_mean.tolist(), "state_std": trajectories.state_std.tolist()},
        "provenance": {"device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
                       "seconds": progress["seconds"], "versions": versions()},
        "checkpoints": {file.name: sha256(file) for file in sorted(folder.glob("epoch_*.safetensors"))}}
    with atomic_write(folder / "run.json") as temporary:
        temporary.write_text(json.dumps({"checksum": _checksum(record), **record}, indent=1) + "\n")
    state.unlink()


def _advance(trainings: list[Generator[Epoch, float, None]], on_steps: Callable[[int], None]) -> None:
    """Train to the end; those that have come equally far in one computation."""
    waiting: dict[Generator, Epoch] = {}

    def go_on(training: Generator, loss: float | None) -> None:
        with contextlib.suppress(StopIteration):
            waiting[training] = training.send(loss)

    for training in trainings:
        go_on(training, None)
    while waiting:
        first = min(epoch.settings["first_step"] for epoch in waiting.values())
        chosen = [training for training, epoch in waiting.items() if epoch.settings["first_step"] == first]
        epochs = [waiting.pop(training) for training in chosen]
        one, report_step = epochs[0], functools.partial(on_steps, len(epochs))
        if len(epochs) == 1:
            losses = [train_epoch(one.model, one.optimiser, one.sampler, one.starts, further_loss=one.further_loss,
                                  on_step=report_step, **one.settings)]
        else:
            losses = train_together([epoch.model for epoch in epochs], [epoch.optimiser for epoch in epochs], one.sampler,
                                    torch.stack([epoch.starts for epoch in epochs]), on_step=report_step, **one.settings)
        for training, loss in zip(chosen, losses, strict=True):
            go_on(training, loss)


def fine_tune(config: RunConfig, device: str = "cpu", on_steps: Callable[[int], None] = lambda steps: None) -> Run:
    """The finished run of ``config``: loaded if it is there, resumed if it was interrupted, trained if absent.

    Of several processes that ask for one run, one trains and the others wait. ``on_steps(n)`` is called as n more training
    steps are done. A run appears under its name only when it is whole; until then it grows under ``.partial``.
    """
    return fine_tune_together([config], device, on_steps)[0]


def fine_tune_together(configs: list[RunConfig], device: str = "cuda",
                       on_steps: Callable[[int], None] = lambda steps: None) -> list[Run]:
    """``fine_tune`` of several configs, whose epochs are one batched computation; they may differ in their seeds."""
    with contextlib.ExitStack() as locks:
        begun, trainings = [], []
        for config in sorted(configs, key=lambda config: config.name):  # in one order: no two processes wait for each other
            final, growing = runs_root() / config.name, runs_root() / ".partial" / config.name
            locks.enter_context(locked(growing))
            if final.exists():
                on_steps(config.epochs * config.steps_per_epoch)
                continue
            growing.mkdir(exist_ok=True)
            for leftover in growing.glob(".writing-*"):
                leftover.unlink()
            begun.append((growing, final))
            if not (growing / "run.json").exists() or (growing / "resume.safetensors").exists():
                trainings.append(_train(config, growing, device, on_steps))
        with one_thread(device), torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            _advance(trainings, on_steps)
        for growing, final in begun:
            os.rename(growing, final)
    return [Run.open(runs_root() / config.name) for config in configs]


def _groups(configs: list[RunConfig]) -> list[list[RunConfig]]:
    """Configs that differ in their seed alone, of models too small to fill a GPU, side by side; every other one by itself."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        alike = get_initialisation(config.initialisation).weights is None and SIZES[config.size][1] <= 128 and not (
            config.compile or config.alignment or config.cotraining or config.adapter_rank or config.frozen_blocks)
        shared = dataclasses.replace(config, seed=0, starting_weights="").name if alike else config.name
        groups.setdefault(shared, []).append(config)
    return list(groups.values())


def fine_tuned(configs: list[RunConfig], device: str = "auto", processes: int | None = None,
               progress: bool = True) -> list[Run]:
    """The finished runs of ``configs``, in order; missing ones are trained, several at once: one a core, or one a card.

    ``device`` "auto" is "cuda" where there is one, else "cpu". Ctrl-C leaves every run resumable from its last finished
    epoch. Raises UserError for an absent device, and as the data do.
    """
    device = choose_device(device)
    missing = [config for config in dict.fromkeys(configs) if not (runs_root() / config.name).exists()]
    for config in {(c.task, c.dataset, c.dataset_steps): c for c in missing}.values():
        load_data(config, progress)  # collects or downloads once, before the processes start
    groups = _groups(missing) if device == "cuda" else [[config] for config in missing]
    steps = sum(config.epochs * config.steps_per_epoch for config in missing)
    with tqdm(total=steps, desc=f"fine-tuning {len(missing)} runs", unit="step", disable=not (progress and missing)) as bar:
        spread(fine_tune_together, groups, device, processes, bar)  # faster than one run on all cores
    return [Run.open(runs_root() / config.name) for config in configs]
