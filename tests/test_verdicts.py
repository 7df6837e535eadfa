import numpy as np
import pytest
from conftest import cells

from dtlib.verdicts import decide, report


@pytest.mark.parametrize(
    "values, threshold, verdict",
    [
        ([1.0, 1.1, 1.2], 0, "supported"),
        ([-1.0, -1.1, -1.2], 0, "not supported"),
        ([-1.0, 1.0, 2.0], 0, "undecided"),
        ([1.0, 1.1, 1.2], 1, "undecided"),
        ([5.0, 5.1], 0, "undecided"),
        ([np.nan, 1.0, 1.0], 0, "not measured"),
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


def test_report_counts_and_names_claims_that_depend_on_the_measure(capsys):
    rows = [
        decide("A 1", claim, "above 0", measure, "hopper", np.add([1, 1.1, 0.9], shift))
        for claim, measure, shift in (
            ("It holds.", "as written", 0),
            ("It holds.", "corrected", -2),
            ("Both agree.", "as written", 0),
        )
    ]
    rows.append(decide("control", "Ours.", "above 0", "corrected", "hopper", [1, 2, 3]))
    table = report(rows)
    said = capsys.readouterr().out
    assert "as written: of 2 of the paper's claims, 2 supported." in said
    assert "“It holds” is supported as written, not supported corrected." in said
    assert "Both agree" not in said and "Ours" not in said
    assert said.count("Undecided: neither.") == 1
    assert len(table) == 4
    two_seeds = [decide("A 1", "It holds.", "above 0", "corrected", "hopper", [1, 2])]
    assert not {"low", "high"} & set(report(two_seeds))


def test_the_rule_in_the_notebook_decides_alike():
    shown = cells("10_verdicts", "measure")
    rng = np.random.default_rng(0)
    for values in (rng.normal(0.5, 1, (50, 4)), rng.normal(0, 1, (50, 3))):
        for own in values:
            row = decide("A 1", "It holds.", "above 0", "corrected", "hopper", own)
            found = shown.interval(own)
            assert found == pytest.approx((row["effect"], row["low"], row["high"]))
            assert shown.verdict(*found[1:], 0) == row["verdict"]
