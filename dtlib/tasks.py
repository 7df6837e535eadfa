"""The tasks: which environment, which shapes, which target returns, and what a return is worth as a score."""

import warnings
from dataclasses import dataclass

import gymnasium
import mujoco
import numpy as np

from dtlib.errors import UserError

mujoco.set_mju_user_warning(warnings.warn)  # by default they go to a MUJOCO_LOG.TXT in the working directory


@dataclass(frozen=True)
class Task:
    """One locomotion task. Returns are undiscounted sums of an episode's rewards; lengths are in environment steps."""

    name: str
    environment: str  # gymnasium's id. -v4 has the physics of the -v2 that D4RL used, so D4RL's references apply
    state_dim: int
    action_dim: int
    targets: tuple[float, ...]  # returns asked of the model; the first is the one to report
    d4rl_reference: tuple[float, float]  # return that scores 0, return that scores 100
    takagi_reference: tuple[float, float]
    horizon: int = 1000
    return_scale: float = 1000.0  # returns-to-go are divided by this before the model sees them

    def scores(self, returns: float | np.ndarray) -> dict[str, float | np.ndarray]:
        """Normalised scores 100·(return − random)/(expert − random): ``D4RL`` with D4RL's constants, ``Takagi`` with the mean
        returns of D4RL's random and expert data sets. They differ by 7 to 14 % where a policy works, and by more near a
        random one's return: a score says nothing without its name."""
        references = {"D4RL": self.d4rl_reference, "Takagi": self.takagi_reference}
        return {scale: 100 * (returns - random) / (expert - random) for scale, (random, expert) in references.items()}

    def make_environment(self, **options: object) -> gymnasium.Env:
        """The real MuJoCo environment, cut at the horizon; ``options`` go to ``gymnasium.make``."""
        with warnings.catch_warnings():
            # gymnasium calls -v4 out of date, and MuJoCo a word in its HalfCheetah; here -v4 is chosen for its physics.
            warnings.simplefilter("ignore")
            return gymnasium.make(self.environment, max_episode_steps=self.horizon, disable_env_checker=True, **options)


# Targets: the released code's, the one that Takagi (2022) reports first. D4RL's references: d4rl.infos. Takagi's: mean returns
# of the -v2 files `random` and `expert`, as public code for the Decision Transformer lists them. Hopper's pair is also in
# Takagi's code; the other two agree to the last digit with the expert means reported elsewhere (10656.43, 4920.51).
TASKS: dict[str, Task] = {task.name: task for task in (
    Task("hopper", "Hopper-v4", 11, 3, (3600.0, 1800.0), (-20.272305, 3234.3), (18.398905, 3511.3577)),
    Task("halfcheetah", "HalfCheetah-v4", 17, 6, (6000.0, 12000.0), (-280.178953, 12135.0), (-288.79712, 10656.426)),
    Task("walker2d", "Walker2d-v4", 17, 6, (5000.0, 2500.0), (1.629008, 4592.3), (1.871351, 4920.507)),
)}


def get_task(name: str) -> Task:
    """The task called ``name``; ``UserError`` for any other."""
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}: the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
