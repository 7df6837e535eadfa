import numpy as np
import pytest

from dtlib.verdicts import decide


@pytest.mark.parametrize(
    "values, threshold, verdict",
    [
        ([1.0, 1.1, 1.2], 0, "supported"),
        ([-1.0, -1.1, -1.2], 0, "not supported"),
        ([-1.0, 1.0, 2.0], 0, "undecided"),
        ([1.0, 1.1, 1.2], 1, "undecided"),
        ([5.0, 5.1], 0, "undecided"),
        ([np.nan, 1.0, 1.0], 0, "undecided"),
    ],
)
def test_the_interval_decides(values, threshold, verdict):
    row = decide("A 5.1", "claim", "rule", "corrected", "hopper", np.array(values), threshold)
    assert row["verdict"] == verdict and row["seeds"] == len(values)


def test_the_interval_is_students():
    row = decide("A 5.1", "claim", "rule", "as written", "hopper", [1.0, 2.0, 3.0])
    assert row["effect"] == 2 and row["high"] - 2 == pytest.approx(
        4.302653 / 3**0.5
    )  # the tables' t for two degrees


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="as released"):
        decide("A 5.1", "claim", "rule", "eyeballed", "hopper", [1.0])
