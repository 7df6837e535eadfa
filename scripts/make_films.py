"""Make the films of the book's gallery: `python scripts/make_films.py`.

A film shows one episode: the robot, the step, and the return that is still asked for. Takes the
runs of notebook 00 at the profile `laptop`, and trains those that are absent. Writes
docs/films/*.webp, the first frames, and films.json, which says what each film shows.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from dtlib import batch, profiles
from dtlib.config import RunConfig
from dtlib.runs import Run, fine_tuned
from dtlib.sources.collected import act, policy_files
from dtlib.storage import atomic_write, write_text
from dtlib.tasks import TASKS, Task, get_task

ROOT = Path(__file__).parents[1]
FOLDER, START = ROOT / "docs/films", 0  # the first state's seed
EVERY, FALLING, SIDE = 12, 60, 200  # steps between two frames, steps shown after a fall; pixels
Choose = Callable[[np.ndarray, float], np.ndarray]  # state (S,), return so far → action (A,)


class Moment(NamedTuple):
    """A step's number, the return so far, whether the robot has fallen, and a picture or None."""

    step: int
    gained: float
    fell: bool
    picture: np.ndarray | None


def by_run(run: Run, target: float) -> Choose:
    """Return a function that acts as the last model of ``run`` does when asked for ``target``.

    It remembers one episode: make another for the next.
    """
    task, context, model = get_task(run.config.task), run.config.context, run.load_model()
    mean, std = run.statistics()
    states, actions, still_to_come = [], [], []

    @torch.no_grad()
    def choose(state: np.ndarray, gained: float) -> np.ndarray:
        states.append((state - mean) / std)
        still_to_come.append((target - gained) / task.return_scale)
        actions.append(np.zeros(task.action_dim))
        first = max(0, len(states) - context)
        seen = (np.stack(part[first:]) for part in (states, actions, still_to_come))
        inputs = [torch.tensor(part, dtype=torch.float32).unsqueeze(0) for part in seen]
        actions[-1] = model.act(*inputs, torch.arange(first, len(states)).unsqueeze(0))[0].numpy()
        return actions[-1].astype(np.float64)

    return choose


def by_policy(task: Task, quality: str, seed: int = 0) -> Choose:
    """Return a function that acts as the policy that collected the data of ``quality`` does."""
    weights, draws = load_file(policy_files(task, quality)[0]), np.random.default_rng(seed)

    def choose(state: np.ndarray, gained: float) -> np.ndarray:
        noise = np.tile(draws.standard_normal(task.action_dim), (4, 1))
        return act(weights, np.tile(state, (4, 1)), noise)[0]

    return choose


def play(task: Task, choose: Choose, seed: int, pictures: bool = True) -> Iterator[Moment]:
    """Yield the moments of one episode, with a picture (SIDE, SIDE, 3) every EVERY steps.

    ``seed`` decides the first state: the same one for everybody who acts. After a fall come some
    pictures more, in which nobody acts and the step no longer counts.
    """
    look = {"render_mode": "rgb_array", "height": SIDE, "width": SIDE, "camera_name": "track"}
    environment = task.make_environment(**look if pictures else {})
    (state, _), gained, idle = environment.reset(seed=seed), 0.0, np.zeros(task.action_dim)
    for step in range(1, task.horizon + 1):
        state, reward, fell, _, _ = environment.step(choose(state, gained))
        gained += reward
        drawn = pictures and step % EVERY == 0
        yield Moment(step, gained, fell, environment.render() if drawn else None)
        if fell:
            break
    for late in range(1, 1 + FALLING * (pictures and fell)):
        environment.step(idle)
        if late % EVERY == 0:
            yield Moment(step, gained, True, environment.render())
    environment.close()


def film(task: Task, choose: Choose, seed: int, path: Path, target: float | None = None) -> Moment:
    """Write an episode as an animated WebP in real time; return its last moment.

    Each frame tells the step and the return still asked for, or without ``target`` the return so
    far. The last frame stays for two seconds. ``path``.png is the first frame.
    """
    moments = list(play(task, choose, seed))
    frames = [_labelled(moment, target) for moment in moments if moment.picture is not None]
    environment = task.make_environment()
    times = [round(1000 * EVERY * environment.unwrapped.dt)] * (len(frames) - 1) + [2000]
    with atomic_write(path) as temporary:
        options = {"duration": times, "loop": 0, "quality": 30, "method": 2}
        frames[0].save(temporary, "webp", save_all=True, append_images=frames[1:], **options)
    with atomic_write(path.with_suffix(".png")) as temporary:
        frames[0].quantize(64).save(temporary, "png", optimize=True)
    return moments[-1]


def _labelled(moment: Moment, target: float | None) -> Image.Image:
    image = Image.fromarray(moment.picture)
    text = f"return so far {moment.gained:.0f}"
    if target is not None:
        text = f"still asked for: {target - moment.gained:.0f}"
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE, 20), fill="firebrick" if moment.fell else "black")
    fell = " · fell" if moment.fell else ""
    draw.text((5, 3), f"step {moment.step}{fell}   {text}", fill="white", font_size=12)
    return image


def main() -> None:
    """Make all films, one after the other."""
    known = batch.defaults(ROOT / "notebooks/00_sanity_check.ipynb")
    settings, task = profiles.training("laptop", {}), get_task(known["tasks"][0])
    starts = [known["random"], known["language"], known["image"], *known["controls"]]
    same = {"task": task.name, "context": known["context"], "seed": known["seeds"][0]}
    found = fine_tuned([RunConfig(initialisation=name, **same, **settings) for name in starts])
    who = "the policy that was recorded"
    acting = [(f"{r.name}, {who}", r, by_policy(r, "medium"), None) for r in TASKS.values()]
    for name, run in zip(starts, found, strict=True):
        for target in task.targets if name == known["random"] else task.targets[:1]:
            acting.append((f"{task.name}, {name}", task, by_run(run, target), target))
    about = {}
    for who, robot, choose, target in acting:
        name = "-".join([*who.replace(",", "").split(), *([f"{target:.0f}"] if target else [])])
        last = film(robot, choose, START, FOLDER / f"{name}.webp", target)
        about[name] = {"who": who, "target": target, "return": last.gained}
        about[name] |= {"steps": last.step, "fell": bool(last.fell)}
        print(name, about[name], flush=True)
    write_text(FOLDER / "films.json", about)


if __name__ == "__main__":
    main()
