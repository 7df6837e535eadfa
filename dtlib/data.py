"""Offline trajectories, wherever they come from, as flat arrays; and the windows of them that a model learns from."""

import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

from dtlib.collect import QUALITIES, collect
from dtlib.errors import UserError, locked, no_room
from dtlib.seeding import stream_seed
from dtlib.tasks import Task

D4RL_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # D4RL's; the last may be absent
PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth"}


@dataclass(frozen=True, eq=False)
class Trajectories:
    """E episodes laid end to end, N steps in all: episode e is rows ``starts[e]:starts[e + 1]``."""

    name: str
    observations: np.ndarray  # (N, S) float32, raw
    actions: np.ndarray  # (N, A) float32
    rewards: np.ndarray  # (N,) float32
    starts: np.ndarray  # (E + 1,) int64; the last one is N
    notes: tuple[str, ...] = ()  # what loading had to decide

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
        """What to divide by: population standard deviation over all steps plus 1e-6, (S,) float32 [code]."""
        return (self.observations.std(axis=0, dtype=np.float64) + 1e-6).astype(np.float32)

    @cached_property
    def returns_to_go(self) -> np.ndarray:
        """R̂_t: sum of the rewards from step t, included, to its episode's end, (N,) float32."""
        before = np.concatenate([[0.0], np.cumsum(self.rewards, dtype=np.float64)])
        return (np.repeat(before[self.starts[1:]], self.lengths) - before[:-1]).astype(np.float32)

    @cached_property
    def time_steps(self) -> np.ndarray:
        """Step t within its episode, from 0, (N,) int64."""
        return np.arange(len(self.rewards)) - np.repeat(self.starts[:-1], self.lengths)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the arrays: equal exactly when a model would be trained on the same numbers."""
        arrays = self.observations, self.actions, self.rewards, self.starts
        return hashlib.sha256(b"".join(f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays)).hexdigest()

    def rows_of(self, fraction: float, seed: int) -> np.ndarray:
        """The rows of ``fraction`` of the episodes, at least one, drawn from ``seed``: (n,) int64, sorted."""
        number = max(1, round(fraction * len(self.lengths)))
        episodes = np.random.default_rng(stream_seed(seed, "episodes")).permutation(len(self.lengths))[:number]
        return np.flatnonzero(np.isin(np.repeat(np.arange(len(self.lengths)), self.lengths), episodes))

    def delayed(self) -> "Trajectories":
        """The same with each episode's whole return as the reward of its last step, and none before."""
        rewards = np.zeros_like(self.rewards)
        rewards[self.starts[1:] - 1] = self.returns
        return replace(self, name=f"{self.name}, delayed rewards", rewards=rewards)

    def summary(self) -> str:
        """What was loaded, in a few lines: episodes, steps, returns, and what loading had to decide."""
        sums = self.returns
        spread = f"return {sums.mean():.1f} ± {sums.std():.1f} (min {sums.min():.1f}, max {sums.max():.1f})"
        return "\n  - ".join([f"{self.name}: {sums.size:,} episodes, {self.rewards.size:,} steps; {spread}", *self.notes])


def load(dataset: object, task: Task, *, steps: int | None = None, seed: int = 0, progress: bool = True) -> Trajectories:
    """Load ``dataset``, which is one of

    - ``"collected:QUALITY"``: ``steps`` (default 100,000) steps of shipped policies, made on first use from ``seed``;
    - ``"d4rl:QUALITY"``: D4RL's ``-v2`` file, found or downloaded where the d4rl package keeps it (``d4rl_path``);
    - ``"minari:ID"``: a Minari data set, local or downloaded by ``minari``;
    - a path that ends in ``.hdf5`` or ``.h5``, in D4RL's layout, or an object with D4RL's ``get_dataset()``.

    ``steps`` keeps the whole episodes inside the first ``steps`` rows (None: all). Episodes end at terminals or timeouts,
    without a ``timeouts`` array also at the horizon; a partial last one is dropped. Raises UserError.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps}: expected at least 1, or None for everything.")
    name = str(dataset)
    kind, _, what = name.partition(":")
    if callable(getattr(dataset, "get_dataset", None)):
        name, columns = f"{type(dataset).__name__}.get_dataset()", dataset.get_dataset()
    elif kind == "collected":
        columns = _read_hdf5(collect(task, what, steps or 100_000, seed, progress))
    elif kind == "d4rl":
        path = d4rl_path(task, what)
        if not path.exists():
            _download(path, progress)
        columns = _read_hdf5(path)
    elif kind == "minari":
        columns = _read_minari(what, progress)
    elif Path(name).suffix in {".hdf5", ".h5", *PICKLE_SUFFIXES}:
        columns, name = _read_hdf5(Path(name).expanduser()), Path(name).name
    else:
        raise UserError(f"Unknown data set {name[:80]!r}: expected collected:QUALITY or d4rl:QUALITY ({', '.join(QUALITIES)}),"
                        " minari:ID (as in minari:mujoco/hopper/medium-v0), a path to .hdf5 or an object with get_dataset().")
    return _trajectories(name, columns, task, steps)


def _trajectories(name: str, source: dict, task: Task, steps: int | None) -> Trajectories:
    """Check D4RL's flat arrays, cut their first ``steps`` rows into episodes and say in ``notes`` what that took."""
    if missing := [key for key in KEYS[:4] if key not in source]:
        raise UserError(f"{name} has no {' and no '.join(missing)}: expected {', '.join(KEYS[:4])} and, where episodes "
                        "can time out, timeouts, as in D4RL.")
    found, arrays = {key: np.asarray(source[key]) for key in KEYS if key in source}, {}
    sizes = {key: array.shape[:1] for key, array in found.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{name}: the arrays have different lengths, {sizes}; each needs one row a step.")
    for key, array in found.items():
        shape = {"observations": (task.state_dim,), "actions": (task.action_dim,)}.get(key, ())  # (N, 1) is (N,), as in d4rl
        if array.ndim == 0 or array.shape[1:] not in {shape, shape or (1,)} or array.dtype.kind not in "fiub":
            raise UserError(f"{name}: {key} is {array.dtype} of shape {array.shape}, {task.name} needs numbers of shape "
                            f"{('N', *shape)}; choose one of {task.name}'s data sets.")
        arrays[key] = np.asarray(array[:steps], np.float32).reshape(-1, *shape)
        if not (finite := np.isfinite(arrays[key])).all():
            raise UserError(f"{name}: {key} is not finite at step {np.argwhere(~finite)[0, 0]}; remove such episodes.")
    available, rows, horizon = len(found["rewards"]), len(arrays["rewards"]), task.horizon
    notes = [f"read the first {rows:,} of {available:,} steps"] if rows < available else []
    ends = arrays["terminals"] != 0
    if "timeouts" in arrays:
        ends |= arrays["timeouts"] != 0
    else:
        # Deviation: from the second episode on, d4rl's own iterator counts one step fewer.
        index = np.arange(rows)
        begins = np.maximum.accumulate(np.where(np.roll(ends, 1), index, 0))
        ends |= (index - begins + 1) % horizon == 0
        notes.append(f"no timeouts in the data: episodes also end at the horizon, {horizon} steps")
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    if len(starts) == 1:
        raise UserError(f"{name}: no episode ends within {rows:,} steps; expected terminals, timeouts or, without a timeouts "
                        f"array, {horizon} steps in a row. Take more steps, or mend the data.")
    if (longest := np.diff(starts).max()) > horizon:
        raise UserError(f"{name}: an episode has {longest:,} steps, more than the task's horizon, {horizon}; cut it there.")
    if (kept := int(starts[-1])) < rows:
        notes.append(f"dropped the trailing partial episode, {rows - kept:,} steps")
    return Trajectories(name, *(arrays[key][:kept] for key in KEYS[:3]), starts, tuple(notes))


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file in D4RL's layout; anything but a whole HDF5 file is a ``UserError``."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: expected an HDF5 file in D4RL's layout.")
    head = np.fromfile(path, np.uint8, 2).tolist()
    if path.suffix in PICKLE_SUFFIXES or (head[:1] == [0x80] and head[1:] <= [5]):
        raise UserError(f"{path} is a pickle, and none is ever opened, as it can run code: give HDF5 in D4RL's layout.")
    try:
        with h5py.File(path) as file:
            return {key: file[key][()] for key in KEYS if key in file}
    except Exception as error:  # damage surfaces as any of many kinds
        raise UserError(f"{path} is not HDF5, or not all of it is there ({error}): remove it, get it anew.") from error


def _read_minari(identifier: str, progress: bool) -> dict[str, np.ndarray]:
    """A Minari data set as D4RL's arrays: each episode's last observation, which has no action, is left out."""
    import minari  # here, as it is slow to import and seldom needed
    parts = []
    try:
        dataset = minari.load_dataset(identifier, download=True)
        for episode in tqdm(dataset.iterate_episodes(), identifier, dataset.total_episodes, disable=not progress):
            timeouts = episode.truncations | (np.arange(len(episode)) == len(episode) - 1)  # its end is an end
            parts.append((episode.observations[:-1], episode.actions, episode.rewards, episode.terminations, timeouts))
        return {key: np.concatenate(columns) for key, columns in zip(KEYS, zip(*parts, strict=True), strict=True)}
    except Exception as error:  # each of its backends raises its own kind
        raise UserError(f"Minari can neither read nor download {identifier!r} ({error}): expected an id such as "
                        "mujoco/hopper/medium-v0 (see `minari list remote`); remove a damaged copy.") from error


def d4rl_path(task: Task, quality: str) -> Path:
    """Where the d4rl package keeps a ``-v2`` file: in ``D4RL_DATASET_DIR``, else in ``~/.d4rl/datasets``."""
    if quality not in QUALITIES:
        raise UserError(f"Unknown data set d4rl:{quality}: the qualities are {', '.join(QUALITIES)}.")
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    return folder / f"{task.name}_{quality.replace('-', '_')}-v2.hdf5"


def _download(path: Path, progress: bool) -> None:
    """Fetch a D4RL file. What has arrived waits in ``.part`` beside it, and a second call goes on from there."""
    part = path.with_name(path.name + ".part")
    try:
        with locked(path), no_room(path):
            if path.exists():
                return  # another process was quicker
            # The last byte is asked for again, so that a file which is already complete is no bad request.
            have = max(part.stat().st_size - 1, 0) if part.exists() else 0
            request = urllib.request.Request(D4RL_ADDRESS + path.name, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
                start = have if response.status == 206 else 0  # a server without ranges sends everything
                file.truncate(start)
                total = start + int(response.headers["Content-Length"] or 0)
                with tqdm.wrapattr(response, "read", total, initial=start, desc=path.name, disable=not progress) as body:
                    file.writelines(iter(lambda: body.read(1 << 20), b""))
            if (size := part.stat().st_size) < total:
                raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")
            if not h5py.is_hdf5(part):
                part.unlink()
                raise ConnectionError("what the server sent is not HDF5")
            os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # what waits is longer than the file: no part of it
            part.unlink()
        kept = " What has arrived is kept: a second try goes on from there." if part.exists() else ""
        raise UserError(f"Cannot download {path.name} from {D4RL_ADDRESS} ({error}): put {path.name} into {path.parent}, or "
                        f"set D4RL_DATASET_DIR to the folder that has it.{kept}") from error


class Windows(NamedTuple):
    """B windows of K steps, padded on the right: real steps come first, every padded entry is zero."""

    states: torch.Tensor  # (B, K, S) float32, standardised
    actions: torch.Tensor  # (B, K, A) float32
    returns_to_go: torch.Tensor  # (B, K) float32, divided by the task's return scale
    time_steps: torch.Tensor  # (B, K) int64
    mask: torch.Tensor  # (B, K) bool: True at real steps


class WindowSampler:
    """All trajectories on one device, and any window of them by indexing; ``context`` is K.

    A window is named by its first step, a row from 0 to ``number_of_steps`` − 1. Rows drawn uniformly give the papers'
    windows: an episode in proportion to its length, a start uniformly in it. (The released code leaves out the episode of
    lowest return, by a strict ``<``.)
    """

    def __init__(self, trajectories: Trajectories, context: int, return_scale: float, device: torch.device | str = "cpu"):
        states = (trajectories.observations - trajectories.state_mean) / trajectories.state_std
        returns_to_go = trajectories.returns_to_go / np.float32(return_scale)
        ends = np.repeat(trajectories.starts[1:], trajectories.lengths)  # for each step, the first row after its episode
        # Each gets one more row, of zeros: it is what padding points to.
        *self._columns, self._ends = (
            torch.from_numpy(np.concatenate([rows, np.zeros_like(rows[:1])])).to(device)
            for rows in (states, trajectories.actions, returns_to_go, trajectories.time_steps, ends))
        self._offsets = torch.arange(context, device=device)
        self.number_of_steps = len(trajectories.rewards)

    def whole_starts(self) -> torch.Tensor:
        """The starts of all windows that need no padding, (n,) int64."""
        rows = torch.arange(self.number_of_steps, device=self._ends.device)
        return rows[rows + len(self._offsets) <= self._ends[:-1]]

    def windows(self, starts: torch.Tensor) -> Windows:
        """The windows that begin at rows ``starts``, (B,) int64, on this sampler's device; no copy to the host."""
        rows = starts[:, None] + self._offsets
        mask = rows < self._ends[starts][:, None]
        rows = torch.where(mask, rows, self.number_of_steps)
        return Windows(*(column[rows] for column in self._columns), mask)
