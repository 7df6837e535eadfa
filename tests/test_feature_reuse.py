"""Debiased CKA against loops over the U-statistic; the released code's two quirks by hand."""

import itertools

import numpy as np
import pytest
import torch
from conftest import cells

reuse = cells("01_feature_reuse", "measure")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hsic_by_loops(x, y):
    """Song et al. (2012): the U-statistic, a mean over ordered quadruples of different windows."""
    a, b = (x @ x.T).tolist(), (y @ y.T).tolist()
    terms = [
        a[i][j] * (b[i][j] + b[q][r] - 2 * b[i][q])
        for i, j, q, r in itertools.permutations(range(len(x)), 4)
    ]
    return sum(terms) / len(terms)


def cka_by_loops(x, y):
    return hsic_by_loops(x, y) / (hsic_by_loops(x, x) * hsic_by_loops(y, y)) ** 0.5


@pytest.mark.parametrize("n", [4, 5, 8])
def test_cka_equals_the_u_statistic(n):
    x, y = normal(n, 3) + 5, normal(n, 2, seed=1) + normal(n, 3)[:, :2]
    assert reuse.cka(reuse.gram(x), reuse.gram(y)).item() == pytest.approx(
        cka_by_loops(x, y), abs=1e-10
    )
    a, b = reuse.gram(x), reuse.gram(y)
    assert (a * b).sum().item() / (n * (n - 3)) == pytest.approx(hsic_by_loops(x, y), abs=1e-9)
    torch.testing.assert_close(a.sum(-1), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-9)


def test_cka_is_one_for_rotated_scaled_and_shifted_features():
    x = normal(30, 6) * torch.tensor([9.0, 4, 2, 1, 1, 1])
    rotation, y = torch.linalg.qr(normal(6, 6, seed=2)).Q, normal(30, 4, seed=3) + x[:, :4]
    same, other = reuse.gram(0.1 * x @ rotation + 7), reuse.gram(y)
    assert reuse.cka(reuse.gram(x), same).item() == pytest.approx(1, abs=1e-10)
    assert reuse.cka(same, other).item() == pytest.approx(
        reuse.cka(reuse.gram(x), other).item(), abs=1e-10
    )
    stretched = reuse.gram(
        x * torch.tensor([1, 1, 1, 1, 5, 9])
    )  # CKA is not invariant to every linear map
    assert reuse.cka(stretched, other).item() < reuse.cka(reuse.gram(x), other).item() - 0.2


def test_cka_of_independent_features_is_zero_on_average():
    first, second = reuse.gram(normal(400, 20, 200)), reuse.gram(normal(400, 20, 150, seed=1))
    values = reuse.cka(first, second)
    assert abs(values.mean()) < 4 * values.std() / 20
    centring = torch.eye(20, dtype=torch.float64) - 1 / 20
    biased = [
        centring @ (x @ x.mT) @ centring
        for x in (normal(400, 20, 200), normal(400, 20, 150, seed=1))
    ]
    assert (
        (biased[0] * biased[1]).sum((1, 2))
        / (biased[0].norm(dim=(1, 2)) * biased[1].norm(dim=(1, 2)))
    ).mean() > 0.8


def test_shuffled_blocks_have_the_same_entries_and_compute_something_else():
    blocks = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5))
    before = [tensor.clone() for tensor in blocks.parameters()]
    null, again = reuse.shuffled(blocks, seed=1), reuse.shuffled(blocks, seed=1)
    for old, own, new, same in zip(
        before, blocks.parameters(), null.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(own, old) and torch.equal(new, same) and not torch.equal(new, old)
        assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
    assert new.requires_grad


def test_without_is_least_squares():
    known, features = normal(20, 3), normal(20, 4, seed=1)
    design = np.hstack([known.numpy(), np.ones((20, 1))])
    fit = design @ np.linalg.lstsq(design, features.numpy(), rcond=None)[0]
    left = reuse.without(known, features)
    np.testing.assert_allclose(left.numpy(), features.numpy() - fit, atol=1e-12)
    assert reuse.without(known, known @ normal(3, 4) + 2).abs().max() < 1e-12


def test_released_index_takes_a_unit_of_all_tokens_and_the_text_a_token():
    activation = torch.arange(24.0).reshape(2, 3, 4)  # 2 windows, the 3 tokens of one step, width 4
    by_unit, by_token = reuse.unit_features(activation), reuse.token_features(activation)
    assert by_unit.shape == (3, 2, 3) and by_token.shape == (3, 2, 4)
    assert by_unit[1].tolist() == [[2, 6, 10], [14, 18, 22]] == activation[:, :, -2].tolist()
    assert by_token[1].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]] == activation[:, -2, :].tolist()
    assert (
        by_unit[2].tolist() == activation[:, :, -1].tolist()
        and by_token[0].tolist() == activation[:, -3].tolist()
    )


def test_nine_names_stand_for_seven_outputs_a_block_and_released_for_fewer():
    written, released = reuse.nine_layers(3, False), reuse.nine_layers(3, True)
    assert list(written) == list(released) and len(written) == 27
    assert (
        len(set(written.values())) == 21 and len(set(released.values())) == 19
    )  # one activation instead of three
    assert (
        released["h.0.mlp.act"]
        == released["h.2.mlp.act"]
        == "h.2.mlp.act"
        != written["h.0.mlp.act"]
    )
    assert (
        released["h.1.attn.resid_dropout"] == "h.1.attn.c_proj"
        and written["h.1.mlp.dropout"] == "h.1.mlp.c_proj"
    )
    assert list(written)[:9] == [f"h.0.{layer}" for layer in reuse.NINE]


def test_released_constant_shrinks_faint_outputs_and_hides_dead_ones():
    x = reuse.gram(normal(10, 3))
    size = x.norm().item()
    assert reuse.cka(x, x, added=1e-6).item() == pytest.approx(size**2 / (size**2 + 1e-6))
    faint = x * 1e-3 / size
    assert reuse.cka(faint, faint, added=1e-6).item() == pytest.approx(0.5)
    dead = reuse.gram(
        torch.full((10, 3), 7.3, dtype=torch.float64)
    )  # not zero, but the same for all windows
    assert reuse.cka(dead, x).isnan() and reuse.cka(dead, x, added=1e-6) == 0


def test_too_few_windows():
    with pytest.raises(ValueError, match="at least 4 windows, not 3"):
        reuse.cka(*reuse.gram(normal(2, 3, 5)))
