"""This machine's verdicts beside the committed ones: another processor gives other last digits."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from dtlib.errors import UserError, explained
from dtlib.profiles import values_digest
from dtlib.storage import digest, notebook_hash, repository

KEY = ["notebook", "task", "claim", "rule", "measure"]
NUMBERS = ["effect", "low", "high"]


def read_results(path: Path, text: str | None = None) -> dict:
    """Return what a results.json holds, or its ``text`` then; numbers that are null become NaN.

    Raises UserError for a damaged or edited file.
    """
    kinds = OSError, ValueError, TypeError, AttributeError, KeyError
    with explained(f"{path} is damaged", "run its notebook again", *kinds):
        results = json.loads(path.read_text(encoding="utf-8") if text is None else text)
        code, older = results.pop("checksum", None), "profile_values" not in results
        if code != digest(results) and not (code is None and older):
            raise ValueError("it was edited")
        for row in results.get("verdicts", []):
            numbers = {key: np.nan if row[key] is None else float(row[key]) for key in NUMBERS}
            row |= numbers | {key: row[key] for key in (*KEY[1:], "verdict")}
    return results


def read_table(path: Path) -> pd.DataFrame:
    """Return a csv of figures/PROFILE/NOTEBOOK. Raises UserError if it is not as it was written.

    The results.json beside it has its digest; older ones have none.
    """
    with explained(f"{path} cannot be read", "run its notebook again", OSError, ValueError):
        if not (results := path.with_name("results.json")).exists():
            raise ValueError("its run was interrupted")
        known, text = read_results(results).get("tables"), path.read_bytes().decode("utf-8")
        if known is not None and known.get(path.stem) != digest(text):
            raise ValueError("it was edited, or is of another run")
        return pd.read_csv(io.StringIO(text))


def other_settings(path: Path) -> str:
    """Say with which other settings than its profile's a results.json in PROFILE/NOTEBOOK ran."""
    results = read_results(path)
    profile, overrides = results.get("profile"), results.get("overrides") or {}
    if profile == path.parts[-3] and not overrides:
        same = results.get("profile_values") in (None, values_digest(profile))
        return "" if same else "run before the profile changed"
    values = [f"{name}={value!r}" for name, value in overrides.items()]
    return f"run with {', '.join([f'profile {profile}', *values])}"


def refusal(path: Path) -> str:
    """Say why the results.json in PROFILE/NOTEBOOK does not count as today's; empty if it does."""
    if other := other_settings(path):
        return other
    profile, name, _ = path.parts[-3:]
    notebook = repository() / "notebooks" / f"{name}.ipynb"
    today = {"profile_values": values_digest(profile), "notebook": notebook_hash(notebook)}
    same = today.items() <= read_results(path).items()
    return "" if same else "the notebook or the profile changed since"


def read_verdicts(path: Path, text: str | None = None) -> pd.DataFrame:
    """Return the verdicts of ``read_results``, one row each, indexed by ``KEY``."""
    rows = pd.DataFrame(read_results(path, text).get("verdicts", []))
    return rows.assign(notebook=path.parent.name).set_index(KEY) if len(rows) else pd.DataFrame()


def committed(path: Path) -> str | None:
    """Return a file's text as of the last commit; None where git has none, or is absent."""
    command = ["git", "show", f"HEAD:./{path.name}"]
    try:
        done = subprocess.run(command, cwd=path.parent, capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return None if done.returncode else done.stdout


def compare(folder: Path) -> str:
    """Say how the verdicts in ``folder`` (figures/<profile>) differ from the committed ones.

    Notebooks that only one of the two has are left out, and named if they have other settings than
    the profile's; single verdicts are counted.
    """
    ours, theirs, others = [], [], []
    for path in sorted(folder.glob("*/results.json")):
        if (text := committed(path)) is None:
            continue
        own = read_verdicts(path)
        if path.read_text(encoding="utf-8") != text and (other := other_settings(path)):
            others.append(f"  Left out: {path.parent.name}, {other}.")
            continue
        theirs.append(read_verdicts(path, text))
        ours.append(own)
    if not (sum(map(len, theirs)) and sum(map(len, ours))):
        return "\n".join([f"{folder}: no verdicts of the last commit to compare with.", *others])
    here, there = pd.concat(ours), pd.concat(theirs)
    if here.index.has_duplicates:
        raise UserError(f"{folder} has a verdict twice: run its notebooks again.")
    both = here.join(there.add_suffix(" committed"), how="inner")
    changed = both[both.verdict != both["verdict committed"]]
    half = (both["high committed"] - both["low committed"]) / 2
    shift = ((both.effect - both["effect committed"]).abs() / half).fillna(0)
    lines = [
        f"{folder}: {len(both) - len(changed)} of {len(both)} verdicts are the committed ones. The "
        f"largest difference of an effect is {shift.max():.2g} of its half-interval."
    ]
    lines += others
    for whose, some in ("only here", here), ("only committed", there):
        if alone := len(some) - len(both):
            lines.append(f"  {alone} {whose}, because claims or rules differ or are absent.")
    for (notebook, task, claim, _, measure), row in changed.iterrows():
        lines.append(f"  {notebook}, {task}, {measure}: {claim}")
        for whose, end in (("committed", " committed"), ("here", "")):
            effect, low, high = (row[name + end] for name in ("effect", "low", "high"))
            ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"  # as span says it
            lines.append(f"    {whose}: {row[f'verdict{end}']}, {effect:.3f}{ends}")
    return "\n".join(lines)
