"""How soon a learning curve gets somewhere, if it ever does, and the smoothing of the paper's curves (A 5.5, 5.6.1)."""

import warnings

import numpy as np
from scipy import signal, stats


def first_at_least(steps: np.ndarray, values: np.ndarray, level: float) -> tuple[float, bool]:
    """The first of ``steps`` (points,) at which ``values`` (points,) reach ``level``, and whether they do.

    A curve that never does is censored: the last step and False. Nothing is assumed between checkpoints, so a time is known
    to one checkpoint only: right for a noisy return.
    """
    reached = np.flatnonzero(np.asarray(values) >= level)
    return float(steps[reached[0] if len(reached) else -1]), len(reached) > 0


def first_error_below(steps: np.ndarray, errors: np.ndarray, level: float) -> tuple[float, bool]:
    """As ``first_at_least`` for ``errors`` (points,) > 0 that fall to ``level``, at steps between two checkpoints, too.

    Between checkpoints the logarithm of the error is taken to be linear in the step, as errors fall by factors.
    """
    reached = np.flatnonzero(np.asarray(errors) <= level)
    if not len(reached) or reached[0] == 0:
        return float(steps[0 if len(reached) else -1]), len(reached) > 0
    around = slice(reached[0] - 1, reached[0] + 1)
    return float(np.interp(-np.log(level), -np.log(errors[around]), steps[around])), True


def survival(times: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan and Meier's estimate of the share of runs that are not there yet: (steps, share), from step 0 and share 1 on.

    times (runs,) and reached (runs,) as the functions above give them, of runs with one starting point; the share holds from
    each step to the next.
    """
    curve = _not_there_yet(times, reached)
    return np.append(0.0, curve.quantiles), np.append(1.0, curve.probabilities)


def median_time(times: np.ndarray, reached: np.ndarray) -> tuple[float, float, float]:
    """Median time by the survival curve and its 95 % interval (Brookmeyer and Crowley 1982): median, low, high.

    inf where the curve, or a bound of its log-log band, stays above one half: few runs give wide intervals.
    """
    curve = _not_there_yet(times, reached)
    with warnings.catch_warnings():
        # Where none or all have got there the band is undefined (NaN), which scipy warns of; the estimate itself stands.
        warnings.simplefilter("ignore", RuntimeWarning)
        band = curve.confidence_interval(0.95, method="log-log")
    shares = [curve.probabilities, *(np.where(np.isnan(bound.probabilities), curve.probabilities, bound.probabilities)
                                     for bound in (band.low, band.high))]
    return tuple(float(np.append(curve.quantiles, np.inf)[np.append(share <= 0.5, True).argmax()]) for share in shares)


def _not_there_yet(times: np.ndarray, reached: np.ndarray) -> object:
    censored = stats.CensoredData.right_censored(np.asarray(times, float), ~np.asarray(reached, bool))
    return stats.ecdf(censored).sf


def moving_average_as_released(values: np.ndarray, keep: float = 0.8) -> np.ndarray:
    """The paper's smoothing of curves (..., points): m_t = keep·m_{t−1} + (1 − keep)·v_t, where m_1 = (2 − keep)·v_1 [code].

    The filter's state is set to v_1 where keep·v_1 would make m_1 = v_1: each curve begins at 1.2 times its first value, and
    its tenth point still carries 0.8⁹ = 13 % of that.
    """
    values = np.asarray(values, np.float64)
    return signal.lfilter([1 - keep], [1, -keep], values, zi=values[..., :1])[0]


def moving_average(values: np.ndarray, keep: float = 0.8) -> np.ndarray:
    """The same weights on what there is: m_t is a mean of v_1 … v_t, weighted by keep^(t−i), as Adam corrects its moments."""
    values = np.asarray(values, np.float64)
    return signal.lfilter([1 - keep], [1, -keep], values) / (1 - keep ** np.arange(1, values.shape[-1] + 1))
