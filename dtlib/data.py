"""Offline trajectories as flat arrays, and the windows of them that a model learns from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtlib.errors import UserError
from dtlib.seeding import stream_seed
from dtlib.sources import collected, episodes, files
from dtlib.storage import typed
from dtlib.tasks import Task


@dataclass(frozen=True, eq=False)
class Trajectories:
    """E episodes laid end to end, N steps in all: episode e is rows ``starts[e]:starts[e + 1]``."""

    name: str
    observations: np.ndarray  # (N, S) float32, raw
    actions: np.ndarray  # (N, A) float32
    rewards: np.ndarray  # (N,) float32
    starts: np.ndarray  # (E + 1,) int64; the last one is N
    notes: tuple[str, ...] = ()  # decisions made while loading, such as a dropped last episode

    @cached_property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, (E,) int64."""
        return np.diff(self.starts)

    @cached_property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (E,) float64."""
        return np.add.reduceat(self.rewards, self.starts[:-1], dtype=np.float64)

    @cached_property
    def state_mean(self) -> np.ndarray:
        """Mean of each observation dimension over all steps, (S,) float32."""
        return self.observations.mean(axis=0, dtype=np.float64).astype(np.float32)

    @cached_property
    def state_std(self) -> np.ndarray:
        """Population standard deviation over all steps plus 1e-6, (S,) float32 [code]."""
        return (self.observations.std(axis=0, dtype=np.float64) + 1e-6).astype(np.float32)

    @cached_property
    def returns_to_go(self) -> np.ndarray:
        """R̂_t: the sum of the rewards from step t to its episode's end, (N,) float32."""
        before = np.concatenate([[0.0], np.cumsum(self.rewards, dtype=np.float64)])
        at_end = np.repeat(before[self.starts[1:]], self.lengths)
        return (at_end - before[:-1]).astype(np.float32)

    @cached_property
    def time_steps(self) -> np.ndarray:
        """Step t within its episode, from 0, (N,) int64."""
        return np.arange(len(self.rewards)) - np.repeat(self.starts[:-1], self.lengths)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the arrays: equal exactly if all numbers are equal."""
        return episodes.fingerprint((self.observations, self.actions, self.rewards, self.starts))

    def rows_of(self, fraction: float, seed: int) -> np.ndarray:
        """Draw a ``fraction`` of the episodes from ``seed``; return their rows (n,) int64."""
        count = len(self.lengths)
        order = np.random.default_rng(stream_seed(seed, "episodes")).permutation(count)
        chosen = order[: max(1, round(fraction * count))]
        return np.flatnonzero(np.isin(np.repeat(np.arange(count), self.lengths), chosen))

    def delayed(self) -> "Trajectories":
        """Return a copy whose episodes give their whole return at the last step, and 0 before."""
        rewards = np.zeros_like(self.rewards)
        rewards[self.starts[1:] - 1] = self.returns
        return replace(self, name=f"{self.name}, delayed rewards", rewards=rewards)

    def summary(self) -> str:
        """Describe the episodes, steps and returns, and the decisions made while loading."""
        sums = self.returns
        returns = f"return {sums.mean():.1f} ± {sums.std():.1f}"
        ends = f"(min {sums.min():.1f}, max {sums.max():.1f})"
        size = f"{self.name}: {sums.size:,} episodes, {self.rewards.size:,} steps"
        return "\n  - ".join([f"{size}; {returns} {ends}", *self.notes])


def load(
    dataset: object, task: Task, *, steps: int | None = None, seed: int = 0, progress: bool = True
) -> Trajectories:
    """Load ``dataset``, which is one of

    - ``"collected:QUALITY"``: shipped policies act for ``steps`` (None: 100,000), from ``seed``;
    - ``"d4rl:QUALITY"``: D4RL's ``-v2`` file, found or downloaded where the d4rl package keeps it;
    - ``"minari:ID"``: a Minari data set, local or downloaded by ``minari``;
    - a path to ``.hdf5`` or ``.h5`` in D4RL's layout, or an object with D4RL's ``get_dataset()``.

    Of other kinds, ``steps`` is how many rows are read (None: all). An episode that is not wholly
    within them is dropped. An episode ends at a terminal or a timeout; without a ``timeouts`` array
    it also ends at the horizon. Raises UserError.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps}: expected at least 1, or None for everything.")
    name = str(dataset)
    kind, _, what = name.partition(":")
    if callable(getattr(dataset, "get_dataset", None)):
        name, columns = f"{type(dataset).__name__}.get_dataset()", dataset.get_dataset()
        if not isinstance(columns, Mapping):
            raise UserError(f"{name} gave {columns!r:.80}: expected D4RL's arrays by name.")
    elif kind == "collected":
        path = collected.collect(task, what, steps or 100_000, seed, progress)
        columns = files.read_hdf5(path)
    elif kind == "d4rl":
        columns = files.read_hdf5(files.d4rl_file(task, what, progress))
    elif kind == "minari":
        columns = files.read_minari(what, progress)
    elif Path(name).suffix.lower() in files.SUFFIXES:
        columns, name = files.read_hdf5(typed(name)), Path(name).name
    else:
        known = f"collected:QUALITY or d4rl:QUALITY ({', '.join(collected.QUALITIES)}), minari:ID"
        expected = f"{known}, a path to .hdf5, or an object with get_dataset()"
        raise UserError(f"Unknown data set {name[:80]!r}: expected {expected}.")
    arrays, starts, notes = episodes.whole_episodes(name, columns, task, steps)
    found = Trajectories(name, *arrays, starts, notes)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = found.returns_to_go, (found.observations - found.state_mean) / found.state_std
    if not all(np.isfinite(values).all() for values in sums):
        raise UserError(f"{name}: sums of its numbers overflow; divide rewards and states by 1000.")
    return found


class Windows(NamedTuple):
    """B windows of K steps, padded on the right: real steps come first, padded entries are zero."""

    states: Tensor  # (B, K, S) float32, standardised
    actions: Tensor  # (B, K, A) float32
    returns_to_go: Tensor  # (B, K) float32, divided by the task's return scale
    time_steps: Tensor  # (B, K) int64
    mask: Tensor  # (B, K) bool: True at real steps


class WindowSampler:
    """Give any window of K = ``context`` steps, with all trajectories on one device.

    A window is named by its first step, a row from 0 to ``number_of_steps`` − 1. Drawing first rows
    uniformly equals the papers' scheme: an episode with probability proportional to its length,
    then a step in it. ([code] never draws the episode of lowest return, because of a strict ``<``.)
    """

    def __init__(
        self, trajectories: Trajectories, context: int, return_scale: float, device: str = "cpu"
    ):
        states = (trajectories.observations - trajectories.state_mean) / trajectories.state_std
        returns_to_go = trajectories.returns_to_go / np.float32(return_scale)
        # For each step, the first row after its episode.
        ends = np.repeat(trajectories.starts[1:], trajectories.lengths)
        arrays = states, trajectories.actions, returns_to_go, trajectories.time_steps, ends
        # A last row of zeros: padded steps point to it.
        padded = [np.concatenate([rows, np.zeros_like(rows[:1])]) for rows in arrays]
        *self._columns, self._ends = (torch.from_numpy(rows).to(device) for rows in padded)
        self._offsets = torch.arange(context, device=device)
        self.number_of_steps = len(trajectories.rewards)

    def whole_windows(self) -> Tensor:
        """Return the first rows of all windows that need no padding, (n,) int64."""
        rows = torch.arange(self.number_of_steps, device=self._ends.device)
        return rows[rows + len(self._offsets) <= self._ends[:-1]]

    def windows(self, first_rows: Tensor) -> Windows:
        """Return the windows that begin at ``first_rows`` (B,) int64."""
        rows = first_rows[:, None] + self._offsets  # (B, K)
        mask = rows < self._ends[first_rows][:, None]
        rows = torch.where(mask, rows, self.number_of_steps)
        return Windows(*(column[rows] for column in self._columns), mask)
