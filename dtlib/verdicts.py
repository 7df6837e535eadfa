"""One row a claim: what the paper says, the rule that decides it, what was found, what follows."""

import numpy as np
import pandas as pd

from dtlib.figures import sentence, t_interval

MEASURES = ("as released", "as written", "corrected")
MEANING = """Supported: the whole interval (low to high) lies above the threshold. Not supported: it
lies below. Undecided: neither."""


def decide(
    section: str, claim: str, rule: str, measure: str, task: str, values, threshold: float = 0.0
) -> dict:
    """A row of notebook 10: the claim says that ``values`` (seeds,) exceed ``threshold``.

    Their mean's 95 % t-interval over seeds decides. All of it above: "supported"; all of it below:
    "not supported"; otherwise, and with fewer than three seeds: "undecided". Values with a NaN:
    "not measured". ``section`` is one of the paper, as in "A 5.1"; ``rule`` is one sentence that
    names the effect; ``measure`` is one of MEASURES. Raises ValueError for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}; expected one of {MEASURES}")
    effect, low, high = t_interval(values)
    verdict = "not supported" if high < threshold else "undecided"
    verdict = "supported" if low > threshold else verdict
    verdict = "not measured" if np.isnan(effect) else verdict
    about = {"section": section, "claim": claim, "rule": rule, "measure": measure, "task": task}
    found = {"effect": effect, "low": low, "high": high, "threshold": threshold}
    return {**about, **found, "seeds": len(values), "verdict": verdict}


def report(rows: list[dict]) -> pd.DataFrame:
    """Say in sentences what ``decide`` gave; return the table to show below them.

    They count the paper's claims by verdict for each measure, and name those whose verdict changes
    with the measure. Columns without a number (intervals of two seeds) are left out.
    """
    table = pd.DataFrame(rows)
    of_paper = table[table.section != "control"]
    for measure, own in of_paper.groupby("measure", sort=False):
        counts = own.verdict.value_counts(sort=False).items()
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts)
        sentence(f"{measure}: of {len(own)} of the paper's claims, {found}.")
    for (task, claim), own in of_paper.groupby(["task", "claim"], sort=False):
        if own.verdict.nunique() > 1:
            found = ", ".join(f"{row.verdict} {row.measure}" for row in own.itertuples())
            sentence(f"{task}: “{claim.rstrip('.')}” is {found}.")
    sentence(MEANING)
    columns = ["task", "claim", "rule", "measure", "effect", "low", "high", "threshold", "verdict"]
    return table[columns].dropna(axis=1, how="all").round(3)
