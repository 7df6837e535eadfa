"""Make the films of the book's gallery: `python scripts/make_films.py`.

Takes the runs of notebook 00 at the profile `laptop`, and trains those that are absent. Writes
docs/films/*.webp, the first frames, and films.json, which says what each film shows.
"""

from pathlib import Path

from dtlib import batch, films, profiles, runs
from dtlib.config import RunConfig
from dtlib.storage import write_text
from dtlib.tasks import TASKS, get_task

ROOT = Path(__file__).parents[1]
FOLDER, START = ROOT / "docs/films", 0  # the first state's seed


def main() -> None:
    """Make all films, one after the other."""
    known = batch.defaults(ROOT / "notebooks/00_sanity_check.ipynb")
    settings, task = profiles.training("laptop", {}), get_task(known["tasks"][0])
    starts = [known["random"], known["language"], known["image"], *known["controls"]]
    same = {"task": task.name, "context": known["context"], "seed": known["seeds"][0]}
    found = runs.fine_tuned([RunConfig(initialisation=name, **same, **settings) for name in starts])
    acting = [
        (
            f"{robot.name}, the policy that was recorded",
            robot,
            films.by_policy(robot, "medium"),
            None,
        )
        for robot in TASKS.values()
    ]
    for name, run in zip(starts, found, strict=True):
        for target in task.targets if name == known["random"] else task.targets[:1]:
            acting.append((f"{task.name}, {name}", task, films.by_run(run, target), target))
    about = {}
    for who, robot, choose, target in acting:
        name = "-".join([*who.replace(",", "").split(), *([f"{target:.0f}"] if target else [])])
        last = films.film(robot, choose, START, FOLDER / f"{name}.webp", target)
        about[name] = {"who": who, "target": target, "return": last.gained}
        about[name] |= {"steps": last.step, "fell": bool(last.fell)}
        print(name, about[name], flush=True)
    write_text(FOLDER / "films.json", about)


if __name__ == "__main__":
    main()
