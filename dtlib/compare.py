"""This machine's verdicts beside the committed ones: another processor gives other last digits."""

import json
import subprocess
from pathlib import Path

import pandas as pd

KEY = ["notebook", "task", "claim", "rule", "measure"]


def read_verdicts(notebook: str, text: str) -> pd.DataFrame:
    """Return the verdicts in the text of a results.json, one row each, indexed by ``KEY``."""
    rows = pd.DataFrame(json.loads(text).get("verdicts", [])).assign(notebook=notebook)
    return rows.set_index(KEY) if len(rows) else pd.DataFrame()


def committed(path: Path) -> str | None:
    """Return a file's text as of the last commit; None where git has none."""
    command = ["git", "show", f"HEAD:./{path.name}"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    return None if done.returncode else done.stdout


def compare(folder: Path) -> str:
    """Say how the verdicts in ``folder`` (figures/<profile>) differ from the committed ones.

    Notebooks that only one of the two has are left out.
    """
    ours, theirs = [], []
    for path in sorted(folder.glob("*/results.json")):
        if (text := committed(path)) is not None:
            name = path.parent.name
            theirs.append(read_verdicts(name, text))
            ours.append(read_verdicts(name, path.read_text(encoding="utf-8")))
    if not sum(map(len, theirs)):
        return f"{folder}: no verdicts of the last commit to compare with."
    both = pd.concat(ours).join(pd.concat(theirs).add_suffix(" committed"), how="inner")
    changed = both[both.verdict != both["verdict committed"]]
    half = (both["high committed"] - both["low committed"]) / 2
    shift = ((both.effect - both["effect committed"]).abs() / half).fillna(0)
    lines = [
        f"{folder}: {len(both) - len(changed)} of {len(both)} verdicts are the committed ones. The "
        f"largest difference of an effect is {shift.max():.2g} of its half-interval."
    ]
    for (notebook, task, claim, _, measure), row in changed.iterrows():
        lines.append(f"  {notebook}, {task}, {measure}: {claim}")
        for whose, end in (("committed", " committed"), ("here", "")):
            effect, low, high = (row[name + end] for name in ("effect", "low", "high"))
            verdict = row[f"verdict{end}"]
            lines.append(f"    {whose}: {verdict}, {effect:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)
