"""What runs cost: operations, bytes, kernels and physics are counted; a machine's rates turn them into seconds.

The rates of a machine that is at hand are fitted to measured steps and rollouts (`benchmarks/cost.py`, which also checks them
against finished runs); those of other machines are assumed from data sheets, and what follows from them is a prediction.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dtlib.corpora import COLOURS, STATES
from dtlib.model import SIZES
from dtlib.pretrain import PretrainConfig
from dtlib.runs import RunConfig
from dtlib.tasks import get_task

PASSES = 26  # values of the model's width that a token reads and writes in a block's forward pass, beside matrix products
KERNELS = 30  # started by a block's forward pass
KEPT = 16  # values of the model's width that the backward pass needs of a token in a block, attention being fused


class Work(NamedTuple):
    """``operations``: multiplications and additions of matrix products; ``moved``: bytes read and written by all else;
    ``kernels``: how many are started; ``physics``: environment steps times substeps times degrees of freedom; ``rounds``: how
    often a batch of environments is stepped."""

    operations: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    physics: float = 0.0
    rounds: float = 0.0

    def plus(self, other: "Work") -> "Work":
        return Work(*np.add(self, other))

    def times(self, factor: float) -> "Work":
        return Work(*np.multiply(self, factor))


@dataclass(frozen=True)
class Machine:
    """Seconds that each unit of ``Work`` takes in a run, and how many runs go on ``side_by_side``."""

    name: str
    rates: tuple[float, float, float, float, float]  # as the fields of Work
    side_by_side: int = 1

    def seconds(self, work: Work) -> float:
        return float(np.dot(work, self.rates))


def _card(name: str, operations: float, moved: float) -> Machine:
    """A card by its data sheet: dense bfloat16 operations and bytes a second, 40 % and 60 % of which are assumed reached.

    A kernel is assumed to take 8 µs to start; physics runs in 8 threads of a processor like the measured one.
    """
    return Machine(name, (1 / (0.4 * operations), 1 / (0.6 * moved), 8e-6, MEASURED.rates[3] / 8, MEASURED.rates[4]))


# Fitted by benchmarks/cost.py, both cores being busy.
MEASURED = Machine("laptop (2 cores of a shared 2.5 GHz Xeon)", (6.4e-12, 1.4e-10, 1.84e-5, 1.59e-6, 3.94e-4), 2)
MACHINES = [MEASURED, _card("consumer card (RTX 4090)", 165e12, 1.0e12),
            _card("data-centre card (H100)", 989e12, 3.35e12)]


def parameters(size: str) -> float:
    """How many a model has: its blocks, and a time-step table of 1000 rows; the rest is small."""
    blocks, width, _ = SIZES[size]
    return blocks * (12 * width**2 + 13 * width) + 1000 * width


def forward(size: str, context: int, windows: float, wanted: int | None = None) -> Work:
    """Of a forward pass for ``windows`` windows.

    The last action is no token, and the last block computes, after its keys and values, ``wanted`` tokens (None: the states).
    """
    blocks, width, _ = SIZES[size]
    tokens = 3 * context - 1

    def block(own: int) -> int:
        return 6 * tokens * width**2 + own * (18 * width**2 + 4 * tokens * width)

    return Work(windows * ((blocks - 1) * block(tokens) + block(wanted or context)),
                4 * PASSES * windows * tokens * width * blocks, KERNELS * (blocks + 1))


def step(size: str, context: int, windows: float) -> Work:
    """Of a training step: three forward passes', and twelve passes of AdamW and clipping over the parameters."""
    return forward(size, context, windows).times(3).plus(Work(moved=4 * 12 * parameters(size)))


def rollouts(task: str, size: str, context: int, lengths: np.ndarray) -> Work:
    """Of episodes in lockstep, by their ``lengths`` (E,)."""
    one = forward(size, context, float(np.sum(lengths)), wanted=1)
    return one._replace(kernels=one.kernels * np.max(lengths), rounds=np.max(lengths),
                        physics=np.sum(lengths) * _physics(task))


@functools.cache
def _physics(task: str) -> int:
    """Substeps of the simulation in an environment step, times degrees of freedom."""
    environment = get_task(task).make_environment().unwrapped
    return environment.frame_skip * environment.model.nv


def expected_lengths(config: RunConfig) -> list[np.ndarray]:
    """Of every evaluation's episodes, before there are any: half of the horizon where one can fall; at first, hardly any."""
    task = get_task(config.task)
    shares = (1.0, 1.0) if task.name == "halfcheetah" else (0.03, 0.5)
    return [np.full(config.evaluation_episodes, task.horizon * shares[epoch > 0]) for epoch in range(config.epochs + 1)]


def of_run(config: RunConfig, lengths: Iterable[np.ndarray] | None = None) -> tuple[Work, Work]:
    """Of a run's training and of its evaluations (``lengths``: of their episodes, if known), but for texts read beside."""
    training = step(config.size, config.context, config.batch_size).times(config.epochs * config.steps_per_epoch)
    evaluation = Work()
    for own in expected_lengths(config) if lengths is None else lengths:
        evaluation = evaluation.plus(rollouts(config.task, config.size, config.context, own))
        evaluation = evaluation.plus(forward(config.size, config.context, 512))  # the action error's windows
    return training, evaluation


def of_pretraining(config: PretrainConfig) -> Work:
    """Of making a starting point; the head costs a product with the vocabulary."""
    blocks, width, _ = SIZES[config.size]
    tokens = config.batch_size * config.sequence
    vocabulary = {"language": config.vocabulary, "image": COLOURS}.get(config.kind, STATES)
    products = tokens * width * (blocks * (24 * width + 4 * config.sequence) + 2 * vocabulary)
    return Work(products, 4 * PASSES * tokens * width * blocks, KERNELS * blocks).times(3).plus(
        Work(moved=48 * parameters(config.size))).times(config.steps)


def memory(config: RunConfig) -> float:
    """GB of a training: weights, gradients, AdamW's two moments, and what the backward pass needs of the forward pass."""
    blocks, width, _ = SIZES[config.size]
    kept = config.batch_size * (3 * config.context - 1) * blocks * KEPT * width
    return 4 * (4 * parameters(config.size) + kept) / 1e9


def disk(config: RunConfig) -> float:
    """GB of a finished run: the weights at the start, at the checkpoints that are kept, and at the end."""
    return 4 * parameters(config.size) * len({0, config.epochs, *config.checkpoints}) / 1e9


def say_plan(profile: str, asked: list[RunConfig], new: list[RunConfig], points: list[PretrainConfig]) -> str:
    """What ``profile`` asks for, how much of it is ``new``, what starting ``points`` come first, and what that costs."""
    largest = max(map(memory, asked), default=0)
    lines = [f"The {profile} profile asks for {len(asked)} runs, {len(new)} of them new, after {len(points)} new starting "
             f"points. The runs leave {sum(map(disk, new)):.1f} GB on the disk; the largest needs {largest:.1f} GB of memory."]
    for machine in MACHINES:
        runs, starts = (sum(machine.seconds(work) for work in works) / machine.side_by_side / 3600 for works in (
            [work for config in new for work in of_run(config)], [of_pretraining(config) for config in points]))
        lines.append(f"  {machine.name:<46}{runs:>9.1f} hours of runs{starts:>9.1f} of pre-training")
    return "\n".join([*lines, "Hours are predicted. Not counted: runs chosen by a notebook's results, games, and measures."])
