"""Times to a level, with runs that never get there, and the moving averages, against loops."""

import numpy as np
import pytest
import torch
from conftest import cells

from dtlib.measures import learning_speed

swap = cells("06_block_swap", "measure")
STEPS = np.array([0, 100, 200, 300])


def test_first_return_is_at_a_checkpoint_or_censored():
    assert learning_speed.first_at_least(STEPS, [5, 40, 90, 10], 40) == (100.0, True)
    assert learning_speed.first_at_least(STEPS, [50, 40, 90, 10], 40) == (0.0, True)
    assert learning_speed.first_at_least(STEPS, [5, 4, 9, 39.9], 40) == (300.0, False)


def test_error_falls_by_equal_factors_between_checkpoints():
    errors = np.array([1.6, 0.8, 0.2, 0.3])
    assert learning_speed.first_error_below(STEPS, errors, 0.4) == (
        pytest.approx(150.0),
        True,
    )  # halfway from 0.8 to 0.2
    assert learning_speed.first_error_below(STEPS, errors, 0.2) == (pytest.approx(200.0), True)
    assert learning_speed.first_error_below(STEPS, errors, 0.1) == (300.0, False)
    assert learning_speed.first_error_below(STEPS, errors, 2.0) == (0.0, True)
    decay = np.exp(-STEPS / 70)  # an exponential is met exactly
    assert learning_speed.first_error_below(STEPS, decay, np.exp(-2.5))[0] == pytest.approx(175)


def test_moving_average_as_released_begins_a_fifth_too_high():
    np.testing.assert_allclose(swap.moving_average_as_released([10.0, 0.0, 5.0]), [12, 9.6, 8.68])
    both = swap.moving_average_as_released([[10.0, 0.0, 5.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(both[1], [1.2, 1.16, 1.128])
    np.testing.assert_allclose(both[0], [12, 9.6, 8.68])


def test_effect_of_a_block_by_hand():
    """Notebook 06: the host's errors are 0.9, 0.2, 0.1, with the block 0.9, 0.15, 0.1."""
    host, swapped = np.array([[0.9, 0.2, 0.1]]), np.array([[0.9, 0.15, 0.1]])
    np.testing.assert_allclose(swap.effect(host, swapped), 0.05)
    np.testing.assert_allclose(swap.effect_as_released(host, swapped), 0.054)


def test_errors_and_shares_by_hand():
    """Notebook 05: a wrong action at the edge has the largest error and passes no gradient."""
    measure = cells("05_no_context", "measure")
    predicted = torch.tensor([[0.9, -0.5, 1.0]])
    taken = torch.tensor([[0.5, -0.5, -1.0]])
    assert measure.action_error(predicted, taken) == pytest.approx(4.16 / 3)
    assert measure.share_passed(predicted) == pytest.approx(0.94 / 3)
    scores = torch.atanh(predicted.clamp(-0.999, 0.999)).requires_grad_()
    torch.tanh(scores).sum().backward()
    assert measure.share_passed(torch.tanh(scores).detach()) == pytest.approx(
        float(scores.grad.mean())
    )
    errors = np.array([[0.1, 0.5, 0.3, 0.4], [9.0, 2.0, 3.0, 1.0]])
    assert measure.best_checkpoint(errors).tolist() == [0.3, 1.0]
    assert measure.last_checkpoint(errors).tolist() == [0.4, 1.0]
