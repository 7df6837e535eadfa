"""Check flat arrays in D4RL's layout, and find where episodes begin and end."""

from collections.abc import Iterable

import numpy as np

from dtlib.errors import UserError
from dtlib.storage import digest
from dtlib.tasks import Task

# D4RL's arrays, one row a step; timeouts may be absent.
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
# The torso's height, the first number of a state, tells the two robots of 17 numbers apart.
HEIGHTS = {"walker2d": (0.8, 2.0), "halfcheetah": (-0.8, 0.7)}


def whole_episodes(
    name: str, source: dict, task: Task, steps: int | None
) -> tuple[list[np.ndarray], np.ndarray, tuple[str, ...]]:
    """Return the whole episodes in the first ``steps`` rows of D4RL's arrays (None: in all).

    That is: observations, actions and rewards as float32; the first row of each episode and, last,
    the number of rows kept; and notes on what was cut or looks odd. Raises UserError.
    """
    kinds = {key: np.asarray(source[key]).dtype for key in KEYS[:3] if key in source}
    notes = [f"{key} are {kind}, not float32" for key, kind in kinds.items() if kind.kind != "f"]
    columns = _checked(name, source, task, steps)
    if (rows := len(columns["rewards"])) < (available := len(source["rewards"])):
        notes.append(f"read the first {rows:,} of {available:,} steps")
    starts, cuts = _find(name, columns, task)
    arrays = [columns[key][: starts[-1]] for key in KEYS[:3]]
    return arrays, starts, (*notes, *cuts, *_odd_values(*arrays[:2], task))


def _checked(name: str, source: dict, task: Task, steps: int | None) -> dict[str, np.ndarray]:
    """The first rows as float32. UserError: missing, not finite, or of another task's shape."""
    required = KEYS[:4]
    if missing := [key for key in required if key not in source]:
        expected = f"{', '.join(required)} and, where episodes can time out, timeouts, as in D4RL"
        raise UserError(f"{name} has no {' and no '.join(missing)}: expected {expected}.")
    if masked := [key for key in KEYS if np.ma.is_masked(source.get(key))]:
        raise UserError(f"{name}: {masked[0]} has masked entries; remove such episodes.")
    found = {key: np.asarray(source[key]) for key in KEYS if key in source}
    sizes = {key: array.shape[:1] for key, array in found.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{name}: arrays of different lengths, {sizes}; each needs a row a step.")
    columns = {}
    for key, array in found.items():
        shape = {"observations": (task.state_dim,), "actions": (task.action_dim,)}.get(key, ())
        fits = array.shape[1:] in {shape, shape or (1,)}  # (N, 1) passes for (N,), as in d4rl
        if array.ndim == 0 or not fits or array.dtype.kind not in "fiub":
            needs = f"{task.name} needs numbers of shape {('N', *shape)}: choose its own data"
            raise UserError(f"{name}: {key} is {array.dtype} of shape {array.shape}, {needs}.")
        columns[key] = np.asarray(array[:steps], np.float32).reshape(-1, *shape)
        if not (finite := np.isfinite(columns[key])).all():
            step = np.argwhere(~finite)[0, 0]
            raise UserError(f"{name}: {key} is not finite at step {step}; remove such episodes.")
    return columns


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Return the SHA-256 of arrays: equal exactly if all numbers, types and shapes are equal."""
    return digest(b"".join(f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays))


def _odd_values(observations: np.ndarray, actions: np.ndarray, task: Task) -> list[str]:
    """Notes on actions out of range, and on states that look like another robot's."""
    notes, outside = [], float((np.abs(actions) > 1).any(1).mean())
    if outside:
        notes.append(f"{outside:.1%} of the steps have actions outside [−1, 1], which act as ±1")
    height = float(observations[:, 0].mean(dtype=np.float64))
    low, high = HEIGHTS.get(task.name, (-np.inf, np.inf))
    if not low <= height <= high:
        problem = f"the mean height is {height:.2f}, not within [{low}, {high}]"
        notes.append(f"{problem}: perhaps these are another robot's states")
    return notes


def _find(name: str, columns: dict, task: Task) -> tuple[np.ndarray, list[str]]:
    """First rows of the episodes, and notes. UserError where none ends, or one is too long."""
    rows, horizon, notes = len(columns["rewards"]), task.horizon, []
    ends = columns["terminals"] != 0
    if "timeouts" in columns:
        ends |= columns["timeouts"] != 0
    else:  # Deviation: from the second episode on, d4rl's own iterator counts one step fewer.
        index = np.arange(rows)
        begins = np.maximum.accumulate(np.where(np.roll(ends, 1), index, 0))
        ends |= (index - begins + 1) % horizon == 0
        notes.append(f"no timeouts in the data: episodes also end at the horizon, {horizon} steps")
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    if len(starts) == 1:
        what = f"no episode ends within {rows:,} steps, by terminals, timeouts or, without timeouts"
        raise UserError(f"{name}: {what}, after {horizon} steps; take more steps or mend the data.")
    if (longest := np.diff(starts).max()) > horizon:
        problem = f"an episode has {longest:,} steps, more than the task's horizon, {horizon}"
        raise UserError(f"{name}: {problem}; cut it there.")
    if (kept := int(starts[-1])) < rows:
        notes.append(f"dropped the trailing partial episode, {rows - kept:,} steps")
    return starts, notes
