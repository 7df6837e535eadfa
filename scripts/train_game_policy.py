"""Tune the policy that collects games of Pong, by the cross-entropy method.

Development only, ten minutes on one core; the result is shipped in ``dtlib/policies``. In each
generation a normal distribution proposes weights, each set of weights plays 1500 steps with sticky
actions, and the distribution moves half-way to that of the best quarter.

    python scripts/train_game_policy.py --out dtlib/policies/pong
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dtlib.wikipedia.emulator import GAMES, HORIZON, Game, lockstep, pong_actions

POPULATION, BEST, STEPS = 20, 5, 1500


def points(game: Game, weights: np.ndarray, seed: int, steps: int) -> np.ndarray:
    """Return each weights' (E, 5) sum of rewards in the first ``steps`` of an episode, (E,)."""
    generators = [np.random.default_rng([seed, e]) for e in range(len(weights))]
    played = lockstep(
        game, generators, lambda *seen: pong_actions(weights, *seen[:2]), sticky=True, horizon=steps
    )
    return sum(rewards * running for _, _, rewards, running in played)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generations", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    game, generator = GAMES["pong"], np.random.default_rng(options.seed)
    mean, spread, curve = np.array([0, 0.5, 4, 5.7, 3]), np.array([0.4, 0.3, 0.6, 0.6, 0.5]), []
    for generation in range(options.generations):
        weights = mean + spread * generator.standard_normal((POPULATION, 5))
        reached = points(game, weights, options.seed + generation, STEPS)
        best = weights[reached.argsort()[-BEST:]]
        mean, spread = (
            (mean + best.mean(0)) / 2,
            (spread + best.std(0)) / 2,
        )  # half-way, as points are noisy
        curve.append(round(float(reached.mean()), 1))
        print(
            f"generation {generation}: points {reached.mean():.1f}, best {reached.max():.0f}",
            mean.round(2),
            flush=True,
        )
    mean = mean.round(2)
    scores = points(game, np.tile(mean, (10, 1)), 10_000, HORIZON)
    policy = {
        "weights": mean.tolist(),
        "score_mean": round(float(scores.mean()), 1),
        "score_sd": round(float(scores.std()), 1),
        "episodes": len(scores),
        "sticky": True,
        "points_in_1500_steps": curve,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "policy.json").write_text(json.dumps(policy, indent=1) + "\n")
    print(policy)


if __name__ == "__main__":
    main()
