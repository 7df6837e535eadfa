"""The command line: ``python -m dtlib``. Commands import what they need when they run, so that --help is quick."""

import ast
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from dtlib.errors import UserError, cache_root


class Commands(typer.core.TyperGroup):
    """Shows what a user can put right as one line, and an interrupt as what it is."""

    def invoke(self, context: object) -> object:
        try:
            return super().invoke(context)
        except UserError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\nInterrupted; run the same command again to resume.", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Decision Transformers from pre-trained starting points: data, fine-tuning, figures.")


def pairs(settings: list[str]) -> dict[str, str]:
    """``["epochs=2"]`` → ``{"epochs": "2"}``."""
    if wrong := [setting for setting in settings if "=" not in setting]:
        raise UserError(f"Cannot read {wrong[0]!r}: expected name=value, such as epochs=2.")
    return dict(setting.split("=", 1) for setting in settings)


def literal(text: str) -> object:
    """``text`` as the Python number, tuple or None that it spells, else as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


@app.command()
def figures(notebooks: list[str] = typer.Argument(None, help="Numbers or names, such as 00 03; all by default."),
            profile: str = typer.Option("laptop", help="smoke, laptop, full, gpu or paper."),
            settings: list[str] = typer.Option([], "--set", help="name=value of a notebook's parameter; repeatable."),
            folder: str = typer.Option("figures", "--figures", help="Folder for PROFILE/NOTEBOOK/….")) -> None:
    """Run the notebooks; write figures and their numbers."""
    from dtlib import batch
    batch.run(profile, notebooks, pairs(settings), folder)


@app.command()
def finetune(settings: list[str] = typer.Argument(None, help="name=value, e.g. size=mini seed=0,1; none: list them."),
             device: str = typer.Option("auto", help="auto, cpu or cuda."),
             processes: int = typer.Option(None, help="Processes on a CPU; one a core by default.")) -> None:
    """Train, resume or find a run; print its learning curve. Several seeds train side by side."""
    from dtlib import runs
    values = {name: literal(text) for name, text in pairs(settings or []).items()}
    if not values:
        return typer.echo("\n".join(f"{field.name}={field.default}" for field in dataclasses.fields(runs.RunConfig)))
    seeds = values.pop("seed", 0)
    configs = [runs.RunConfig(**values, seed=seed) for seed in (seeds if isinstance(seeds, tuple) else [seeds])]
    for run in runs.fine_tuned(configs, device, processes):
        show(run)


def show(run: object) -> None:
    """A run's folder and, per epoch, its action error, mean return and normalised scores."""
    from dtlib.tasks import get_task
    task = get_task(run.config.task)
    typer.echo(f"{run.path}\nepoch  action error    return" + "".join(f"{name:>9}" for name in task.scores(0.0)))
    for row in run.metrics:
        mean = sum(row["returns"]) / len(row["returns"])
        typer.echo(f"{row['epoch']:>5}{row['action_error']:>14.4f}{mean:>10.1f}"
                   + "".join(f"{score:>9.1f}" for score in task.scores(mean).values()))


@app.command()
def data(task: str = typer.Argument("hopper", help="hopper, halfcheetah or walker2d."),
         dataset: str = typer.Argument("collected:medium", help="collected:QUALITY, d4rl:QUALITY, minari:ID, a path."),
         steps: int = typer.Option(None, help="Steps to collect, or to read at most."),
         seed: int = typer.Option(0, help="Seed of the collection.")) -> None:
    """Collect, download or open a data set, and summarise it."""
    from dtlib.data import load
    from dtlib.tasks import get_task
    typer.echo(load(dataset, get_task(task), steps=steps, seed=seed).summary())


@app.command()
def runs(name: str = typer.Argument(None, help="A run's name, or any part of it that no other has: shows it.")) -> None:
    """List the finished runs, or show one."""
    from dtlib.runs import list_runs, runs_root
    found = [run for run in list_runs() if (name or "") in run.path.name]
    if name is None:
        typer.echo("\n".join(run.path.name for run in found) or f"No finished runs in {runs_root()}.")
    elif len(found) != 1:
        raise UserError(f"{len(found)} runs match {name!r}; expected one: `python -m dtlib runs` lists them.")
    else:
        typer.echo("\n".join(f"{key}={value}" for key, value in dataclasses.asdict(found[0].config).items()))
        show(found[0])


HOPPER = "from dtlib.tasks import get_task; env = get_task('hopper').make_environment({}); env.reset(seed=0); "
PROBES = [  # label, what needs it (empty: everything), code that prints a detail or exits with the reason why not
    ("torch", "", "import torch, transformers as t; f = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', bool); "
     "print(f'{torch.__version__}, {torch.get_num_threads()} threads, bfloat16 {f()}; transformers {t.__version__}')"),
    ("CUDA", "profiles gpu and paper", "import torch; torch.cuda.is_available() or exit('torch sees no CUDA device'); "
     "print(f'{torch.cuda.get_device_name()}, bfloat16 {torch.cuda.is_bf16_supported()}')"),
    ("MuJoCo", "", HOPPER.format("") + "env.step([0, 0, 0]); import mujoco as m; print(m.__version__, 'moves Hopper')"),
    ("frames", "the pictures", HOPPER.format("render_mode='rgb_array', width=64, height=64") + "import os; "
     "env.render().any() or exit('the frame is black'); print('off-screen, MUJOCO_GL=' + os.environ['MUJOCO_GL'])"),
]


def probe(code: str) -> tuple[bool, str]:
    """Run ``code`` in its own process, so that a crash in a library ends only that: (works, last line printed)."""
    environment = {"MUJOCO_GL": "egl" if sys.platform == "linux" else "glfw", **os.environ}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"the process ended with status {done.returncode}"


def measure(folder: Path, pattern: str) -> str:
    """How many files match, where, and the size of all that is there."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{len(list(folder.glob(pattern)))} in {folder}, {size / 1e6:.0f} MB"


@app.command()
def doctor() -> None:
    """Say what works here and what each profile lacks. The exit status is 1 if the laptop profile cannot run."""
    from concurrent.futures import ThreadPoolExecutor

    from dtlib.profiles import HOSTS, PROFILES, missing, unreachable
    healthy = True
    def line(label: str, works: bool, detail: str, needed_by: str = "") -> None:
        nonlocal healthy
        healthy = healthy and (works or needed_by != "")
        note = f" (only {needed_by} need it)" if needed_by and not works else ""
        typer.echo(f"{'[OK]' if works else '[FAIL]':<7}{label}: {detail}{note}")

    line("Python", sys.version_info >= (3, 11), f"{platform.python_version()} at {sys.executable}; needed: 3.11")
    with ThreadPoolExecutor() as pool:
        for (label, needed_by, _), (works, detail) in zip(PROBES, pool.map(probe, [p[2] for p in PROBES]), strict=True):
            line(label, works, detail, needed_by)
    root = next(folder for folder in (cache_root(), *cache_root().absolute().parents) if folder.exists())
    free = shutil.disk_usage(root).free / 1e9
    line("disk", free > 2 and os.access(root, os.W_OK), f"{free:.0f} GB free at {root}; needed: 2 GB, writable")
    line("cache of data sets", True, measure(cache_root() / "data", "*.hdf5"))
    line("cache of finished runs", True, measure(cache_root() / "runs", "*/files.json"))
    for address in HOSTS:
        error = unreachable(address)
        line("network", not error, f"{address} {error or 'answers'}", "downloads of profile paper")
    for profile in PROFILES if healthy else []:
        lacks = "; ".join(missing(profile))
        typer.echo(f"[FAIL] profile {profile} lacks {lacks}" if lacks else f"[OK]   profile {profile}: ready")
    raise typer.Exit(0 if healthy else 1)


if __name__ == "__main__":
    app(prog_name="python -m dtlib")
