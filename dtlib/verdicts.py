"""One row a claim: what the paper says, the rule that decides it, what was found, and what follows."""

import numpy as np
from scipy import special

MEASURES = ("as released", "as written", "corrected")


def decide(section: str, claim: str, rule: str, measure: str, task: str, values: np.ndarray, threshold: float = 0.0) -> dict:
    """A row for notebook 10, decided by one number a seed, ``values`` (seeds,): the claim says they exceed ``threshold``.

    Their mean's 95 % t-interval over seeds decides: all of it above, "supported"; all below, "not supported"; else, and with
    fewer than three seeds, "undecided". ``section``: of the paper, as in "A 5.1"; ``rule``: one sentence that names the
    effect; ``measure``: one of MEASURES. Raises ValueError for another.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}; expected one of {MEASURES}")
    values = np.asarray(values, dtype=np.float64)
    effect, low, high = values.mean(), np.nan, np.nan
    if len(values) > 2:
        half = special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
        low, high = effect - half, effect + half
    verdict = "supported" if low > threshold else "not supported" if high < threshold else "undecided"
    return {"section": section, "claim": claim, "rule": rule, "measure": measure, "task": task, "effect": effect, "low": low,
            "high": high, "threshold": threshold, "seeds": len(values), "verdict": verdict}
