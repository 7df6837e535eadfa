"""Parameter change against closed forms and numbers worked by hand."""

import numpy as np
import pytest
import torch
from conftest import cells

measure = cells("03_parameter_change", "measure")
change, depth_contrast, of_block = measure.change, measure.depth_contrast, measure.of_block


def test_change_worked_by_hand():
    found = change(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 12.0], [0.0, 4.0]]))
    assert found == pytest.approx(
        {"distance": 12.0, "cosine": 25 / (5 * 13), "relative": 12 / 5, "per_entry": 6.0}, rel=1e-12
    )


def test_a_tensor_that_starts_at_zero_has_a_distance_but_no_angle_and_no_scale():
    found = change(torch.zeros(4), torch.full((4,), 2.0))
    assert (found["distance"], found["per_entry"]) == (4.0, 2.0)
    assert np.isnan(found["cosine"]) and np.isnan(found["relative"])
    shrunk = change(torch.full((4,), 2.0), torch.zeros(4))
    assert np.isnan(shrunk["cosine"]) and shrunk["relative"] == 1.0


def test_the_released_cosine_is_zero_where_a_tensor_starts_at_zero():
    """Elsewhere it is the cosine up to the 10⁻⁶ in the denominator."""
    draw = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 40, generator=draw)
    assert measure.released_cosine(torch.zeros(4), torch.ones(4)) == 0.0
    ours = change(before, after)["cosine"]
    assert measure.released_cosine(before, after) == pytest.approx(ours, rel=1e-6)
    small = [1e-3 * v.double() for v in (before, after)]
    norms = float(small[0].double().norm() * small[1].double().norm())
    assert measure.released_cosine(*small) == pytest.approx(ours * norms / (norms + 1e-6), rel=1e-9)


def test_what_each_measure_is_blind_to():
    draw = torch.Generator().manual_seed(0)
    before, step = (torch.randn(64, 96, generator=draw, dtype=torch.float64) for _ in range(2))
    plain, scaled = change(before, before + step), change(10 * before, 10 * (before + step))
    tiled = change(
        before.tile(4, 1), (before + step).tile(4, 1)
    )  # the same entries, four times as many
    for name, by_scale, by_size in (
        ("distance", 10, 2),
        ("per_entry", 10, 1),
        ("relative", 1, 1),
        ("cosine", 1, 1),
    ):
        assert scaled[name] / plain[name] == pytest.approx(by_scale, rel=1e-12), name
        assert tiled[name] / plain[name] == pytest.approx(by_size, rel=1e-12), name


def test_a_small_move_of_a_large_float32_tensor_is_measured_in_float64():
    before = torch.full((1_000_000,), 1.0)
    assert 1 - change(before, before * (1 + 2**-20))["cosine"] == pytest.approx(0, abs=1e-12)
    turned = before.clone()
    turned[:500_000] += 2**-12  # an angle of 2⁻¹³, in float32 lost: 1 − cosine is about 2⁻²⁷
    assert 1 - change(before, turned)["cosine"] == pytest.approx(2**-27, rel=1e-3)


def test_thirds_of_any_depth():
    for blocks in (4, 12, 24):
        block = np.repeat(np.arange(blocks), 2)
        third = round(blocks / 3)
        values = np.where(block < third, 5.0, np.where(block >= blocks - third, 2.0, 3.0))
        difference, relative = depth_contrast((block + 0.5) / blocks, values)
        assert difference == pytest.approx(3.0) and relative == pytest.approx(
            3.0 / values.mean()
        ), blocks
    assert depth_contrast([0.1, 0.1, 0.5, 0.9], [np.nan, 4.0, 1.0, 1.0]) == pytest.approx(
        (3.0, 1.5)
    )


def test_names():
    assert of_block("h.11.attn.c_attn.weight") == (11, "attn.c_attn.weight")
    with pytest.raises(ValueError, match="ln_f"):
        of_block("ln_f.weight")
