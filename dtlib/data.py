"""Offline trajectories, wherever they come from, and the windows that a Decision Transformer learns from.

Everything becomes one ``Trajectories``: flat arrays of N steps and the offsets of E episodes. Sources: data collected
here, D4RL's HDF5 files, Minari, any HDF5 file in D4RL's layout, any object with D4RL's ``get_dataset()``.
"""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm

from dtlib.collect import QUALITIES, collect, locked
from dtlib.errors import UserError, no_room
from dtlib.tasks import Task

D4RL_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
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
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.starts):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def summary(self) -> str:
        """What was loaded, in a few lines: episodes, steps, returns, and what loading had to decide."""
        returns = self.returns
        head = (f"{self.name}: {len(returns):,} episodes, {len(self.rewards):,} steps; return {returns.mean():.1f} ± "
                f"{returns.std():.1f} (min {returns.min():.1f}, max {returns.max():.1f})")
        return "\n".join([head, *(f"  - {note}" for note in self.notes)])


def load(dataset: str | os.PathLike | object, task: Task, *, steps: int | None = None, seed: int = 0,
         progress: bool = True) -> Trajectories:
    """Load ``dataset``, which is one of

    - ``"collected:QUALITY"``: ``steps`` (default 100,000) steps of shipped policies, made on first use from ``seed``;
    - ``"d4rl:QUALITY"``: D4RL's ``-v2`` file, found or downloaded where the d4rl package keeps it (``d4rl_path``);
    - ``"minari:ID"``: a Minari data set, local or downloaded by ``minari``;
    - a path that ends in ``.hdf5`` or ``.h5``, in D4RL's layout;
    - an object with D4RL's ``get_dataset()``.

    ``steps`` keeps the whole episodes inside the first ``steps`` rows; ``None`` keeps all. Episodes end at terminals or
    timeouts, or at the horizon where there is no ``timeouts`` array; a partial last one is dropped. ``UserError`` for
    whatever is not such data: it says what is wrong.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps}: expected at least 1, or None for everything.")
    if not isinstance(dataset, (str, os.PathLike)):
        if not callable(getattr(dataset, "get_dataset", None)):
            raise UserError(f"Cannot load a {type(dataset).__name__}: expected text, a path, or an object with D4RL's "
                            "get_dataset() method.")
        return _trajectories(f"{type(dataset).__name__}.get_dataset()", dataset.get_dataset(), task, steps)
    dataset = os.fspath(dataset)
    kind, _, what = dataset.partition(":")
    if kind == "collected":
        rows = steps or 100_000
        return _read_hdf5(dataset, collect(task, what, rows, seed, progress), task, rows)
    if kind == "d4rl":
        path = d4rl_path(task, what)
        if not path.exists():
            _download(path, progress)
        return _read_hdf5(dataset, path, task, steps)
    if kind == "minari":
        return _trajectories(dataset, _read_minari(what, task, progress), task, steps)
    if Path(dataset).suffix in {".hdf5", ".h5", *PICKLE_SUFFIXES}:
        return _read_hdf5(Path(dataset).name, Path(dataset).expanduser(), task, steps)
    raise UserError(f"Unknown data set {dataset!r}: expected collected:QUALITY or d4rl:QUALITY (QUALITY: "
                    f"{', '.join(QUALITIES)}), minari:ID (as in minari:mujoco/hopper/medium-v0) or a path to .hdf5.")


def _trajectories(name: str, source: Mapping, task: Task, steps: int | None) -> Trajectories:
    """Check D4RL's flat arrays, read the first ``steps`` rows of them and find the episodes."""
    shapes = {"observations": (task.state_dim,), "actions": (task.action_dim,), "rewards": (), "terminals": ()}
    if missing := [key for key in shapes if key not in source]:
        raise UserError(f"{name} has no {' and no '.join(missing)}: expected {', '.join(shapes)} and, where episodes "
                        "can time out, timeouts, as in D4RL.")
    shapes |= {"timeouts": ()} if "timeouts" in source else {}
    found = {key: source[key] if isinstance(source[key], h5py.Dataset) else np.asarray(source[key]) for key in shapes}
    for key, shape in shapes.items():
        # As in d4rl, one number a step may be (N,) or (N, 1).
        fits = found[key].ndim >= 1 and found[key].shape[1:] in {shape, shape or (1,)}
        if not fits or found[key].dtype.kind not in "fiub":
            raise UserError(f"{name}: {key} is {found[key].dtype} of shape {found[key].shape}, {task.name} needs "
                            f"numbers of shape {('N', *shape)}; choose one of {task.name}'s data sets.")
    lengths = {key: len(array) for key, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{name}: the arrays have different lengths, {lengths}; each needs one row a step.")
    arrays = {}
    for key, shape in shapes.items():
        arrays[key] = np.asarray(found[key][:steps], np.float32).reshape(-1, *shape)
        if not (finite := np.isfinite(arrays[key])).all():
            raise UserError(f"{name}: {key} is not finite at step {np.argwhere(~finite)[0, 0]}; remove such episodes.")
    return _cut(name, arrays, task.horizon, lengths["rewards"])


def _cut(name: str, arrays: dict[str, np.ndarray], horizon: int, available: int) -> Trajectories:
    """Cut checked arrays into episodes and say in ``notes`` what that took."""
    rows = len(arrays["rewards"])
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
        raise UserError(f"{name}: no episode ends within {rows:,} steps; expected terminals, timeouts or, without a "
                        f"timeouts array, {horizon} steps in a row. Take more steps, or mend the data.")
    if (longest := np.diff(starts).max()) > horizon:
        raise UserError(f"{name}: an episode has {longest:,} steps, more than the task's horizon, {horizon}: expected "
                        "a terminal or a timeout before.")
    if (kept := int(starts[-1])) < rows:
        notes.append(f"dropped the trailing partial episode, {rows - kept:,} steps")
    observations, actions, rewards = (arrays[key][:kept] for key in ("observations", "actions", "rewards"))
    return Trajectories(name, observations, actions, rewards, starts, tuple(notes))


def _read_hdf5(name: str, path: Path, task: Task, steps: int | None) -> Trajectories:
    """Read a file in D4RL's layout; anything but a whole HDF5 file is a ``UserError``."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: expected an HDF5 file in D4RL's layout.")
    with open(path, "rb") as file:
        head = file.read(2)
    if path.suffix in PICKLE_SUFFIXES or (head[:1] == b"\x80" and head[1:] <= b"\x05"):
        raise UserError(f"{path} is a pickle, and none is ever opened, as it can run code: give HDF5 in D4RL's layout.")
    try:
        with h5py.File(path) as file:
            return _trajectories(name, file, task, steps)
    except UserError:
        raise
    except Exception as error:  # damage surfaces as any of many kinds
        raise UserError(f"{path} is not HDF5, or not all of it is there ({error}): remove it, get it anew.") from error


def _read_minari(identifier: str, task: Task, progress: bool) -> dict[str, np.ndarray]:
    """A Minari data set as D4RL's arrays: each episode's last observation, which has no action, is left out."""
    import minari  # here, as it is slow to import and seldom needed

    parts = []
    try:
        dataset = minari.load_dataset(identifier, download=True)
        shapes = dataset.observation_space.shape, dataset.action_space.shape
        if shapes != (expected := ((task.state_dim,), (task.action_dim,))):
            raise UserError(f"minari:{identifier} has states and actions of {shapes}; {task.name} has {expected}.")
        for episode in tqdm(dataset.iterate_episodes(), identifier, dataset.total_episodes, disable=not progress):
            # Whatever its flags say, the end of a Minari episode is an end.
            timeouts = episode.truncations | (np.arange(len(episode)) == len(episode) - 1)
            parts.append((episode.observations[:-1], episode.actions, episode.rewards, episode.terminations, timeouts))
    except UserError:
        raise
    except Exception as error:  # each of its backends raises its own kind
        raise UserError(f"Minari can neither read nor download {identifier!r} ({error}): expected an id such as "
                        "mujoco/hopper/medium-v0 (see `minari list remote`); remove a damaged copy.") from error
    names = "observations", "actions", "rewards", "terminals", "timeouts"
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


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
            if not path.exists():
                _fetch(D4RL_ADDRESS + path.name, part, progress)
                os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # what waits is longer than the file: no part of it
            part.unlink()
        kept = " What has arrived is kept: a second try goes on from there." if part.exists() else ""
        raise UserError(f"Cannot download {path.name} from {D4RL_ADDRESS} ({error}): put {path.name} into {path.parent}"
                        f", or set D4RL_DATASET_DIR to the folder that has it.{kept}") from error


def _fetch(url: str, part: Path, progress: bool) -> None:
    """Append what is missing of ``url`` to ``part``; an error leaves there what has arrived."""
    # The last byte is asked for again, so that a file which is already complete is no bad request.
    have = max(part.stat().st_size - 1, 0) if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
        start = have if response.status == 206 else 0  # a server without ranges sends everything
        file.truncate(start)
        total = start + int(response.headers["Content-Length"] or 0)
        with tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=not progress) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if (size := part.stat().st_size) < total:
        raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")
    if not h5py.is_hdf5(part):
        part.unlink()
        raise ConnectionError("what the server sent is not HDF5")


class Windows(NamedTuple):
    """B windows of K steps, padded on the right: real steps come first, every padded entry is zero."""

    states: torch.Tensor  # (B, K, S) float32, standardised
    actions: torch.Tensor  # (B, K, A) float32
    returns_to_go: torch.Tensor  # (B, K) float32, divided by the task's return scale
    time_steps: torch.Tensor  # (B, K) int64
    mask: torch.Tensor  # (B, K) bool: True at real steps


class WindowSampler:
    """All trajectories on one device, and any window of them by indexing.

    A window is named by its first step, a row from 0 to ``number_of_steps`` − 1. Rows drawn uniformly give the
    papers' distribution: an episode with probability proportional to its length, then a start uniformly in it.
    Deviation [code]: the released code leaves the episode of lowest return out, by a strict ``<``; here none is.
    """

    def __init__(self, trajectories: Trajectories, context: int, return_scale: float,
                 device: torch.device | str = "cpu"):
        """``context`` is K; ``return_scale`` divides the returns-to-go."""
        states = (trajectories.observations - trajectories.state_mean) / trajectories.state_std
        returns_to_go = trajectories.returns_to_go / np.float32(return_scale)
        self._states, self._actions, self._returns_to_go, self._time_steps = (
            # One more row, of zeros: it is what padding points to.
            pad(torch.from_numpy(rows), (0, 0) * (rows.ndim - 1) + (0, 1)).to(device)
            for rows in (states, trajectories.actions, returns_to_go, trajectories.time_steps))
        # For each step, the first row after its episode.
        self._ends = torch.from_numpy(np.repeat(trajectories.starts[1:], trajectories.lengths)).to(device)
        self._offsets = torch.arange(context, device=device)
        self.number_of_steps = len(trajectories.rewards)

    def windows(self, starts: torch.Tensor) -> Windows:
        """The windows that begin at rows ``starts``, (B,) int64, on this sampler's device; no copy to the host."""
        rows = starts[:, None] + self._offsets
        mask = rows < self._ends[starts][:, None]
        rows = torch.where(mask, rows, self.number_of_steps)
        return Windows(self._states[rows], self._actions[rows], self._returns_to_go[rows], self._time_steps[rows], mask)
