"""Recorded games: DQN-replay's files as Dopamine stores them, Pong collected here, windows."""

import gzip
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import ale_py
import numpy as np
import torch
from torch import Tensor

from dtlib.data import Trajectories, Windows, WindowSampler
from dtlib.errors import UserError, explained
from dtlib.progress import tqdm
from dtlib.sources.collected import POLICIES
from dtlib.storage import atomic_write, cache_root, digest, growing, seal
from dtlib.wikipedia.emulator import STACK, Game, lockstep, pong_actions

ARRAYS = {  # dtype, shape of a row
    "$store$_observation": (np.uint8, (84, 84)),
    "$store$_action": (np.int32, ()),
    "$store$_reward": (np.float32, ()),
    "$store$_terminal": (np.uint8, ()),
}
LARGEST_REWARD = 1e6  # of a step, unclipped; sums of more could overflow
BLANKS = STACK - 1  # black rows that Dopamine puts before each episode


def replay_folder(folder: Path) -> Path:
    """Return where a game's files lie: in ``folder``, or in 1/replay_logs as in the bucket."""
    nested = folder / "1" / "replay_logs"
    return nested if nested.is_dir() else folder


def replay_files(folder: Path, checkpoints: tuple[int, ...]) -> list[Path]:
    """Return the files that ``load_replay`` reads, there or not."""
    names = (*ARRAYS, "add_count")
    return [replay_folder(folder) / f"{name}_ckpt.{n}.gz" for n in checkpoints for name in names]


def load_replay(
    folder: Path, game: Game, checkpoints: tuple[int, ...] = (0,), steps: int | None = None
) -> Trajectories:
    """Return a folder's whole episodes: observations (N, 84, 84) uint8, actions (N,) int64.

    A checkpoint is a replay buffer in the order of play. Each gives the first rows of its share of
    ``steps`` (None: all); [code] draws its share at random. Blank rows are left out; [code] learns
    from them too. Raises UserError if files are missing, damaged or of another game.
    """
    name, folder = folder.name, replay_folder(folder)
    share, episodes = steps and math.ceil(steps / len(checkpoints)), []
    for checkpoint in checkpoints:
        screens, actions, rewards, terminals = _read_checkpoint(folder, checkpoint, share)
        ends = np.flatnonzero(terminals) + 1
        for begin, end in zip([0, *ends], ends, strict=False):
            blank = end - begin > BLANKS and not screens[begin : begin + BLANKS].any()
            if blank or begin > 0 or checkpoint == 0:  # else it began in the checkpoint before
                rows = slice(begin + BLANKS * blank, end)
                episodes.append((screens[rows], actions[rows], rewards[rows]))
    if not episodes:
        raise UserError(f"{folder}: no whole episode in what was read: take more steps.")
    screens, actions, rewards = map(np.concatenate, zip(*episodes, strict=True))
    if (actions < 0).any() or (actions >= game.actions).any():
        found = f"actions from {actions.min()} to {actions.max()}, but {game.name}"
        raise UserError(f"{folder} has {found} those from 0 to {game.actions - 1}: take its own.")
    if not np.isfinite(rewards).all() or np.abs(rewards).max() > LARGEST_REWARD:
        raise UserError(f"{folder} has rewards that are no game's: get DQN-replay's own files.")
    starts = np.cumsum([0, *(len(rewards) for _, _, rewards in episodes)])
    return Trajectories(name, screens, actions.astype(np.int64), rewards, starts)


def _read_checkpoint(folder: Path, checkpoint: int, limit: int | None) -> list[np.ndarray]:
    """The first ``limit`` rows (None: all) of each array, without those not filled in the round."""
    columns, totals = {}, {}
    for name, kind in ARRAYS.items():
        columns[name], totals[name] = _read(folder, f"{name}_ckpt.{checkpoint}.gz", kind, limit)
    if len(set(totals.values())) > 1:
        raise UserError(f"{folder}: different lengths, {totals}; get all files of one checkpoint.")
    added, _ = _read(folder, f"add_count_ckpt.{checkpoint}.gz")
    total = totals.popitem()[1]
    if added.size != 1 or added.dtype.kind not in "iu" or added.item() < 0 or total < 1:
        raise UserError(f"{folder}: checkpoint {checkpoint} says not how full it is: get it anew.")
    if not np.isin(columns["$store$_terminal"], (0, 1)).all():
        raise UserError(f"{folder}: terminals other than 0 and 1; get DQN-replay's own files.")
    filled = added.item() % total or None
    return [column[:filled] for column in columns.values()]


def _read(
    folder: Path, name: str, expected: tuple | None = None, limit: int | None = None
) -> tuple[np.ndarray, int]:
    """The first ``limit`` rows of a zipped array, and the number of its rows."""
    kinds = OSError, EOFError, ValueError, SyntaxError, MemoryError, zlib.error
    what, advice = f"{folder / name} is not a whole array", "get a game's replay_logs anew"
    with explained(what, advice, *kinds), gzip.open(folder / name) as file:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        total, *row = shape or (1,)
        if expected and (dtype, tuple(row)) != expected:
            found = f"{folder / name} holds {dtype} in rows of shape {tuple(row)}"
            right = f"expected {np.dtype(expected[0])} and {expected[1]}"
            raise UserError(f"{found}, {right}: get DQN-replay's own file.")
        if by_columns and row:
            raise UserError(f"{folder / name} is in Fortran's order: save it in C's, row by row.")
        rows = min(total, limit or total)
        content = file.read(rows * math.prod(row) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(rows, *row), total


def write_replay(folder: Path, trajectories: Trajectories) -> None:
    """Write checkpoint 0 as Dopamine does. The same data gives the same bytes."""
    terminals = np.zeros(len(trajectories.rewards))
    terminals[trajectories.starts[1:] - 1] = 1
    blanks = np.repeat(trajectories.starts[:-1], BLANKS)
    given = (trajectories.observations, trajectories.actions, trajectories.rewards, terminals)
    files = {
        name: np.insert(values.astype(dtype), blanks, 0, axis=0)
        for (name, (dtype, _)), values in zip(ARRAYS.items(), given, strict=True)
    }
    rows = len(terminals) + len(blanks)  # the buffer is just full: its cursor is at 0,
    files["invalid_range"] = np.arange(-1, STACK) % rows  # which no state may cross
    files["add_count"] = np.array(rows)
    for name, array in files.items():
        with (
            atomic_write(folder / f"{name}_ckpt.0.gz") as temporary,
            open(temporary, "wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file,
        ):
            np.save(file, array, allow_pickle=False)


def collect_game(game: Game, steps: int = 20_000, seed: int = 0, progress: bool = True) -> Path:
    """Return the folder of whole episodes, ``steps`` or more in all, as DQN-replay stores them.

    They are played on first use by the shipped policy; of each episode a share of the actions,
    drawn from 0 to ½, is random. The same arguments give the same bytes. Raises UserError for a
    game without a policy.
    """

    def choose(states: np.ndarray, before: np.ndarray, _: np.ndarray) -> np.ndarray:
        if generator.random() < share:
            return generator.integers(game.actions, size=1)
        return pong_actions(weights, states, before)

    policy = POLICIES / game.name / "policy.json"
    if not policy.exists() or steps < 1 or seed < 0:
        asked = f"Cannot collect {steps} steps of {game.name} with seed {seed}"
        known = "expected pong, the one game with a policy, at least 1 step and a seed from 0"
        raise UserError(f"{asked}: {known}; of other games, load DQN-replay's data.")
    weights = np.array(json.loads(policy.read_text(encoding="utf-8"))["weights"])
    name = f"{game.name}-{steps}-seed{seed}-ale{ale_py.__version__}-{digest(policy)[:8]}"
    with growing(cache_root() / "data" / name, remake=True) as folder:
        if folder is None:
            return cache_root() / "data" / name
        bar = tqdm(desc=f"collecting {game.name}", total=steps, disable=not progress)
        rows, starts = [], [0]
        while len(rows) < steps:
            generator = np.random.default_rng([seed, len(starts)])
            share = generator.uniform(0, 0.5)
            for screens, actions, rewards, _ in lockstep(game, [generator], choose, sticky=True):
                rows.append((screens[0].copy(), *actions, *rewards))
                bar.update()
            starts.append(len(rows))
        bar.close()
        columns = map(np.array, zip(*rows, strict=True))
        write_replay(folder, Trajectories(name, *columns, np.array(starts)))
        seal(folder)
    return cache_root() / "data" / name


class ScreenSampler(WindowSampler):
    """A WindowSampler for games: screens stay uint8, 7 kB each, and are stacked here."""

    def __init__(self, trajectories: Trajectories, context: int, device: str = "cpu"):
        nothing = np.zeros((len(trajectories.rewards), 1), np.float32)  # in place of states
        super().__init__(replace(trajectories, observations=nothing), context, 1.0, device)
        self._screens = torch.from_numpy(trajectories.observations).to(device)
        self._back = torch.arange(1 - STACK, 1, device=device)

    def windows(self, first_rows: Tensor) -> Windows:
        """Return the windows that begin at ``first_rows`` (B,): states (B, K, 4, 84, 84) uint8.

        Screens before an episode, and states of padded steps, are black.
        """
        windows = super().windows(first_rows)
        begun = windows.time_steps[..., None] + self._back >= 0  # (B, K, 4)
        seen = begun & windows.mask[..., None]
        rows = (first_rows[:, None] + self._offsets)[..., None] + self._back
        states = self._screens[torch.where(seen, rows, 0)]
        return windows._replace(states=states.masked_fill_(~seen[..., None, None], 0))
