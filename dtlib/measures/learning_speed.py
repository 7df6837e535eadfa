"""How soon a learning curve reaches a level, if it ever does (paper A, 5.5)."""

import warnings

import numpy as np
from scipy import stats


def first_at_least(steps: np.ndarray, values: np.ndarray, level: float) -> tuple[float, bool]:
    """Return the first of ``steps`` (points,) at which ``values`` (points,) reach ``level``, True.

    A curve that never does is censored: the last step, False. The time is known to one checkpoint
    only, which is right for a noisy return.
    """
    reached = np.flatnonzero(np.asarray(values) >= level)
    return float(steps[reached[0] if len(reached) else -1]), len(reached) > 0


def first_error_below(steps: np.ndarray, errors: np.ndarray, level: float) -> tuple[float, bool]:
    """Like ``first_at_least`` for ``errors`` (points,) > 0 that fall to ``level``.

    Between two checkpoints, the logarithm of the error is taken to be linear in the step.
    """
    reached = np.flatnonzero(np.asarray(errors) <= level)
    if not len(reached) or reached[0] == 0:
        return float(steps[0 if len(reached) else -1]), len(reached) > 0
    around = slice(reached[0] - 1, reached[0] + 1)
    return float(np.interp(-np.log(level), -np.log(errors[around]), steps[around])), True


def median_time(times: np.ndarray, reached: np.ndarray) -> tuple[float, float, float]:
    """Return Kaplan and Meier's median time and its 95 % interval (Brookmeyer and Crowley 1982).

    ``times`` and ``reached`` (runs,) are what the functions above give for runs of one starting
    point. It is inf where the curve, or a bound of its log-log band, stays above one half.
    """
    censored = ~np.asarray(reached, bool)
    curve = stats.ecdf(stats.CensoredData.right_censored(np.asarray(times, float), censored)).sf
    with warnings.catch_warnings():
        # The band is undefined (NaN) where none or all are there, and scipy warns of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        band = curve.confidence_interval(0.95, method="log-log")
    plain, found = curve.probabilities, []
    for shares in (plain, band.low.probabilities, band.high.probabilities):
        half = np.append(np.where(np.isnan(shares), plain, shares) <= 0.5, True).argmax()
        found.append(float(np.append(curve.quantiles, np.inf)[half]))
    return tuple(found)
