"""The Atari games of paper B, an emulator that plays many at once, and a policy for Pong.

A step is one decision, held for four frames. [code] is here Chen et al.'s (2021), as in paper B.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dtlib.errors import explained

with explained("Games need ale-py", "`pip install 'dtlib[games]'`", ModuleNotFoundError):
    from ale_py.vector_env import AtariVectorEnv

HORIZON = 27_000  # steps, 30 minutes of play: DQN's and Chen et al.'s longest episode
STACK = 4  # screens in a state


@dataclass(frozen=True)
class Game:
    """An Atari game. A score is the sum of an episode's rewards, which are not clipped."""

    name: str  # ALE's
    actions: int  # A, the minimal set in ALE's order, as in DQN-replay
    target: float  # return asked of the model, of rewards clipped to [−1, 1], as in DQN-replay
    reference: tuple[float, float]  # score of random actions, score of a human
    context: int = 30  # K
    batch_size: int = 128


# Targets are those of Chen et al. 2021, table 8; two differ from [code]. References: Mnih et al.
# 2015, Wang et al. 2016.
GAMES = {
    "breakout": Game("breakout", 4, 90.0, (1.7, 30.5)),
    "qbert": Game("qbert", 6, 2500.0, (163.9, 13455.0)),
    "pong": Game("pong", 6, 20.0, (-20.7, 14.6), context=50, batch_size=512),
    "seaquest": Game("seaquest", 18, 1450.0, (68.4, 42054.7)),
}


def lockstep(
    game: Game, generators: list, choose: Callable, sticky: bool, horizon: int = HORIZON
) -> Iterator[tuple[np.ndarray, ...]]:
    """Play E games side by side, one for each NumPy generator, for at most ``horizon`` steps.

    Yields each step's screens (E, 84, 84), actions, rewards, and which games still ran, each (E,).
    ``choose(states, actions, rewards)`` returns the next actions. It gets states (E, 4, 84, 84)
    uint8, newest screen last, and the previous actions and rewards. Screens are DQN's: grey, the
    maximum of a step's last two frames, black before the start. ``sticky``: each frame repeats the
    previous action with probability 0.25, as in DQN-replay; [code] evaluates without.
    """
    # ALE's defaults: 1 to 30 idle frames come first; a game is cut after 4 · HORIZON frames.
    settings = {"reward_clipping": False, "use_fire_reset": False}
    settings["repeat_action_probability"] = 0.25 if sticky else 0.0
    settings["num_threads"] = min(len(generators), torch.get_num_threads())
    games = AtariVectorEnv(game.name, len(generators), **settings)
    states, _ = games.reset(seed=np.array([g.integers(1, 2**31 - 1) for g in generators]))
    actions, rewards, running = (np.full(len(generators), start) for start in (0, 0.0, True))
    for _ in range(horizon):
        actions = choose(states, actions, rewards)
        following, rewards, ends, cuts, _ = games.step(actions)
        yield states[:, -1], actions, rewards, running
        states, running = following, running & ~(ends | cuts)  # a finished game begins anew
        if not running.any():
            return


def pong_actions(weights: np.ndarray, states: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return actions (E,) for Pong's states (E, 4, 84, 84) and previous actions (E,).

    The paddle goes to where the ball will arrive, or follows a ball that leaves. ``weights`` (5,)
    or (E, 5), in rows but for the second and the last: where to hit, from the paddle's middle; the
    share of the way to follow; the distance to accept; how far the previous move still carries; the
    ball's speed, in columns a step, below which to fire, which makes it three times as fast.
    """
    aim, follow, margin, glide, slow = weights.T
    court = np.abs(states[:, -2:, 14:77] - 87.0).clip(max=61)  # (E, 2, 63, 84): the ground is 87
    _, paddle = _centre(court[..., 73:76].sum(3))
    last_row, row = _centre(court[..., 12:72].sum(3))
    last_column, column = _centre(court[..., 12:72].sum(2))
    speed = column - last_column
    arrival = row + (row - last_row) * (61 - column) / np.maximum(speed, 0.5)
    arrival = 62 - np.abs(arrival % 124 - 62)  # reflected at both walls
    goal = np.where(speed > 0.5, arrival + aim, 31 + follow * (row - 31))
    error = goal - paddle - glide * np.array([0, 0, -1, 1, -1, 1])[before]
    move = np.where(np.abs(error) > margin, np.sign(error), 0).astype(int)
    return np.array([[2, 0, 3], [4, 1, 5]])[(speed < slow).astype(int), move + 1]  # up, stay, down


def _centre(light: np.ndarray) -> np.ndarray:
    """Mean place of light (E, 2, n) in two screens: (2, E); the middle where there is none."""
    places = np.arange(light.shape[-1])
    means = light @ places / np.maximum(light.sum(-1), 1)
    return np.where(light.any(-1), means, places.mean()).T
