"""Measures of gradients from their inner products, against the gradients themselves."""

import numpy as np
import pytest
import torch
from conftest import cells

gradients = cells("04_gradient_clipping", "measure")

DRAW = np.random.default_rng(0)
ROWS = {
    "small": DRAW.normal(size=(12, 5)),
    "large": DRAW.normal(size=(12, 400)) + 0.3,
    "none": np.zeros((12, 3)),
}
GRAMS = {name: rows @ rows.T for name, rows in ROWS.items()}
ALL, WHOLE = np.concatenate(list(ROWS.values()), axis=1), sum(GRAMS.values())


def test_norms_and_cosines_are_those_of_the_vectors():
    np.testing.assert_allclose(gradients.norms(WHOLE), np.linalg.norm(ALL, axis=1))
    pairs = [np.corrcoef(ALL[i], ALL[j])[0, 1] for i in range(12) for j in range(i)]
    centred = ALL - ALL.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.sort(gradients.cosines(centred @ centred.T)), np.sort(pairs))
    found = gradients.cosines(WHOLE)
    assert found.shape == (66,) and found[0] == pytest.approx(
        ALL[0] @ ALL[1] / np.prod(gradients.norms(WHOLE)[:2])
    )
    assert np.isnan(gradients.cosines(GRAMS["none"])).all()


def test_confusion_worked_by_hand():
    rows = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0]])
    np.testing.assert_allclose(
        gradients.cosines(rows @ rows.T), [0, -(0.5**0.5), 0.5**0.5], atol=1e-12
    )


def test_clipping_is_by_the_norm_of_all_parameters():
    """A window whose blocks lie below the threshold is clipped if all parameters lie above it."""
    blocks, rest = (
        np.array([[0.2, 0.0], [0.12, 0.16], [3.0, 4.0]]),
        np.array([[0.0], [0.75], [0.0]]),
    )
    found = gradients.clipped_norms(blocks @ blocks.T, blocks @ blocks.T + rest @ rest.T)
    for row, other, norm in zip(blocks, rest, found, strict=True):
        parameters = [
            torch.nn.Parameter(torch.zeros(len(part), dtype=torch.float64)) for part in (row, other)
        ]
        for parameter, part in zip(parameters, (row, other), strict=True):
            parameter.grad = torch.from_numpy(part.copy())
        torch.nn.utils.clip_grad_norm_(parameters, 0.25)
        assert norm == pytest.approx(float(parameters[0].grad.norm()), rel=1e-12)
    assert found[0] == 0.2 and found[1] < 0.07 and found[2] == pytest.approx(0.25, rel=1e-5)


def test_the_norm_of_a_batch():
    norms = gradients.batch_norms(WHOLE, batch_size=4, batches=500, seed=1)
    counts = np.random.default_rng(1).multinomial(4, np.full(12, 1 / 12), size=500)
    np.testing.assert_allclose(norms, np.linalg.norm(counts @ ALL / 4, axis=1))
    alone = gradients.batch_norms(WHOLE, batch_size=1, batches=2000)
    np.testing.assert_allclose(np.unique(alone.round(9)), np.sort(gradients.norms(WHOLE)).round(9))
    opposed = np.array([[1.0, -1.0], [-1.0, 1.0]])  # two windows that cancel
    assert set(gradients.batch_norms(opposed, 2, 100).round(12)) == {0.0, 1.0}


def test_shares_of_the_squared_norm():
    of_batch = gradients.shares_of_batch(GRAMS)
    mean = {name: rows.mean(axis=0) for name, rows in ROWS.items()}
    assert of_batch["large"] == pytest.approx(
        (mean["large"] ** 2).sum() / (ALL.mean(axis=0) ** 2).sum()
    )
    of_windows = gradients.shares_of_windows(GRAMS)
    assert of_windows["small"] == pytest.approx(
        np.mean((ROWS["small"] ** 2).sum(1) / (ALL**2).sum(1))
    )
    for shares in (of_batch, of_windows):
        assert shares["none"] == 0 and sum(shares.values()) == pytest.approx(1)
    assert (
        of_windows["small"] > 2 * of_batch["small"]
    )  # without a common part, a batch averages it away
    idle = {
        name: np.pad(gram, (0, 3)) for name, gram in GRAMS.items()
    }  # three windows more, without any gradient
    assert gradients.shares_of_windows(idle) == pytest.approx(of_windows)
