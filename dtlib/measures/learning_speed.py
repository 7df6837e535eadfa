"""How soon a learning curve reaches a level, if it ever does (paper A, 5.5)."""

import numpy as np


def first_at_least(steps: np.ndarray, values: np.ndarray, level: float) -> tuple[float, bool]:
    """Return the first of ``steps`` (points,) at which ``values`` (points,) reach ``level``, True.

    A curve that never does is censored: the last step, False.
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
