"""One row a claim: what the paper says, the rule that decides it, what was found, what follows."""

import numpy as np
from scipy import special

MEASURES = ("as released", "as written", "corrected")


def decide(
    section: str, claim: str, rule: str, measure: str, task: str, values, threshold: float = 0.0
) -> dict:
    """A row of notebook 10: the claim says that ``values`` (seeds,) exceed ``threshold``.

    Their mean's 95 % t-interval over seeds decides. All of it above: "supported"; all of it below:
    "not supported"; otherwise, and with fewer than three seeds: "undecided". ``section`` is one of
    the paper, as in "A 5.1"; ``rule`` is one sentence that names the effect; ``measure`` is one of
    MEASURES. Raises ValueError for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}; expected one of {MEASURES}")
    values = np.asarray(values, dtype=np.float64)
    effect, low, high, seeds = values.mean(), np.nan, np.nan, len(values)
    if seeds > 2:
        half = special.stdtrit(seeds - 1, 0.975) * values.std(ddof=1) / seeds**0.5
        low, high = effect - half, effect + half
    verdict = (
        "supported" if low > threshold else "not supported" if high < threshold else "undecided"
    )
    about = {"section": section, "claim": claim, "rule": rule, "measure": measure, "task": task}
    found = {"effect": effect, "low": low, "high": high, "threshold": threshold, "seeds": seeds}
    return {**about, **found, "verdict": verdict}
