"""The tasks: environment, shapes, target returns and normalised scores."""

import os
import sys
import warnings
from dataclasses import dataclass
from unittest.mock import patch

import gymnasium
import numpy as np

from dtlib.errors import UserError

# Without a renderer, which MUJOCO_GL names and which may be missing: gymnasium imports it to draw.
with patch.dict(os.environ, MUJOCO_GL="disable"):
    import mujoco

mujoco.set_mju_user_warning(warnings.warn)  # by default MuJoCo writes to ./MUJOCO_LOG.TXT


@dataclass(frozen=True)
class Task:
    """A locomotion task. Returns are undiscounted sums of rewards."""

    name: str
    environment: str  # gymnasium's id; -v4 has the physics of the -v2 that D4RL recorded
    state_dim: int  # S
    action_dim: int  # A
    targets: tuple[float, ...]  # returns that an evaluation asks for; results report the first
    d4rl_reference: tuple[float, float]  # the returns that score 0 and 100
    takagi_reference: tuple[float, float]  # the same on Takagi's scale
    horizon: int = 1000  # longest episode
    return_scale: float = 1000.0  # the model sees returns-to-go divided by this

    def scores(self, returns: float | np.ndarray) -> dict[str, float | np.ndarray]:
        """Normalised scores 100·(return − random)/(expert − random), by the name of their scale.

        ``D4RL`` uses D4RL's constants, ``Takagi`` the mean returns of D4RL's random and expert data
        sets. The scales differ by 7 to 14 % where a policy works: always name the scale.
        """
        references = {"D4RL": self.d4rl_reference, "Takagi": self.takagi_reference}
        return {
            scale: 100 * (returns - random) / (expert - random)
            for scale, (random, expert) in references.items()
        }

    def make_environment(self, **options: object) -> gymnasium.Env:
        """Return the environment, cut at the horizon. ``options`` go to ``gymnasium.make``."""
        if "render_mode" in options:  # draws without a display
            os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium warns that -v4 is old
            options |= {"max_episode_steps": self.horizon, "disable_env_checker": True}
            return gymnasium.make(self.environment, **options)


ROBOTS = (  # name, environment, S, A, targets of the released code
    ("hopper", "Hopper-v4", 11, 3, (3600.0, 1800.0)),
    ("halfcheetah", "HalfCheetah-v4", 17, 6, (6000.0, 12000.0)),
    ("walker2d", "Walker2d-v4", 17, 6, (5000.0, 2500.0)),
)
D4RL = {  # from d4rl.infos
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
}
# Mean returns of D4RL's -v2 files `random` and `expert`: Hopper's in the released code, the others
# in other public code.
TAKAGI = {
    "hopper": (18.398905, 3511.3577),
    "halfcheetah": (-288.79712, 10656.426),
    "walker2d": (1.871351, 4920.507),
}
TASKS = {name: Task(name, *shape, D4RL[name], TAKAGI[name]) for name, *shape in ROBOTS}


def get_task(name: str) -> Task:
    """Return the task called ``name``. Raises UserError for any other name."""
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}: the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
