"""Decision Transformers from pre-trained starting points: data, fine-tuning, figures."""

import os
import shutil
import subprocess
import sys

INTERRUPTED = "\nInterrupted; run the same command again to resume."


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C was the cause: libraries turn it into other errors, or into their text."""
    if error is None or "KeyboardInterrupt" in repr(error):
        return error is not None
    return any(map(interrupted, {error.__cause__, error.__context__}))


def _uncaught(kind: type, error: BaseException, trace: object) -> None:
    if interrupted(error):  # during the imports below
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught

from pathlib import Path  # noqa: E402

import typer  # noqa: E402

# The rest is imported by the commands, so that --help is quick.
from dtlib.errors import UserError  # noqa: E402

SETTINGS = typer.Option(None, "--set", help="name=value; repeatable.")
NO_MEMORY = ("not enough memory", "out of memory", "can't allocate")


class Commands(typer.core.TyperGroup):
    """Commands whose errors are one line if the user can put them right."""

    def invoke(self, context: object) -> object:
        """Run a command."""
        try:
            return super().invoke(context)
        except BaseException as error:
            if interrupted(error):
                _end(INTERRUPTED, 130, error)
            if isinstance(error, UserError | OSError) and not isinstance(error, BrokenPipeError):
                _end(f"Error: {error}", 2, error)
            full = isinstance(error, RuntimeError) and any(n in str(error) for n in NO_MEMORY)
            if full or isinstance(error, MemoryError):
                _end(f"Error: too little memory ({error}): take fewer or smaller models.", 2, error)
            raise  # of a closed pipe, such as "| head", typer says nothing


def _end(text: str, status: int, error: BaseException) -> None:
    typer.echo(text, err=True)
    raise typer.Exit(status) from error


OPTIONS = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(cls=Commands, rich_markup_mode=None, help=__doc__, **OPTIONS)


def describe(run: object) -> str:
    """Return a run's folder, settings and, epoch by epoch, action error, mean return and scores."""
    from dtlib.tasks import get_task

    lines = [str(run.path), " ".join(f"{name}={value}" for name, value in vars(run.config).items())]
    for row in run.metrics:
        mean = sum(row["returns"]) / len(row["returns"])
        scores = get_task(run.config.task).scores(mean).items()
        parts = [f"epoch {row['epoch']:>3}", f"action error {row['action_error']:.4f}"]
        parts += [f"return {mean:>7.1f}", *(f"{name} {score:>5.1f}" for name, score in scores)]
        lines.append("   ".join(parts))
    return "\n".join(lines)


@app.command()
def figures(
    notebooks: list[str] = typer.Argument(None, help="Numbers or names, such as 00 03; or all."),
    profile: str = typer.Option("laptop", help="smoke, laptop, seeds, full, real, gpu or paper."),
    figures: str = typer.Option("", help="Folder; default: figures, in the repository."),
    settings: list[str] = SETTINGS,
    plan: bool = typer.Option(False, "--plan", help="Say what it would cost, and stop."),
    scheduler: str = typer.Option("", envvar="DTLIB_SCHEDULER", help="Dask's, tcp://HOST:PORT."),
    slurm: str = typer.Option("", help="""Start Slurm jobs: '{"jobs": 4, "queue": "gpu", …}'."""),
) -> None:
    """Run the notebooks; write figures and their numbers into FIGURES/PROFILE/NOTEBOOK."""
    from dtlib import batch, storage

    figures = str(storage.typed(figures)) if figures else "figures"
    batch.run(profile, notebooks, settings or [], figures, plan, scheduler, slurm)


@app.command()
def compare(profile: str = "laptop", figures: str = "") -> None:
    """Compare the verdicts in FIGURES/PROFILE with the committed ones."""
    from dtlib import compare, profiles, storage

    profiles.load_profile(profile)  # an unknown one is said
    folder = (storage.typed(figures) if figures else storage.repository() / "figures") / profile
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give a profile that was run into FIGURES.")
    typer.echo(compare.compare(folder))


@app.command()
def finetune(
    settings: list[str] = typer.Argument(None, help="name=value, e.g. seed=0,1; none: list them."),
    device: str = "auto",
    processes: int = typer.Option(None, help="How many on a CPU; default: one a core."),
) -> None:
    """Train, resume or find runs on DEVICE (auto, cpu, cuda); print their learning curves."""
    from dtlib import storage
    from dtlib.config import RunConfig
    from dtlib.runs import fine_tuned
    from dtlib.settings import parse_settings

    storage.sweep_cache()
    known = vars(RunConfig())
    if not settings:
        return typer.echo("\n".join(f"{name}={value}" for name, value in known.items()))
    values = parse_settings(settings, known | {"seed": [0]})
    if not (seeds := values.pop("seed", [0])):
        raise UserError("Parameter seed got no number: give one or several, such as seed=0,1.")
    for run in fine_tuned([RunConfig(**values, seed=seed) for seed in seeds], device, processes):
        typer.echo(describe(run))


@app.command()
def pretrain(
    kind: str = typer.Argument(help="language, image, markov or iid."),
    size: str = typer.Option("mini", help="tiny, mini, chibit, small, gpt2, imagegpt or atari."),
    seed: int = 0,
    corpus: str = typer.Option("", help="python, wikitext-2, wikitext-103; or a folder of files."),
    settings: list[str] = SETTINGS,
    out: Path = typer.Option(None, help="Folder; default: in the cache, where runs find it."),
    device: str = "auto",
) -> None:
    """Pre-train a starting point, or resume one; print its folder and held-out loss."""
    from dtlib import storage
    from dtlib.pretraining import training
    from dtlib.settings import parse_settings

    storage.sweep_cache()
    settings = [f"corpus={corpus}"] * bool(corpus) + (settings or [])
    values = {"kind": kind, "size": size, "seed": seed}
    values |= parse_settings(settings, {"tokens": "", "corpus": ""})
    folder = training.pretrain(training.PretrainConfig(**values), out, device)
    losses = training.load_starting_point(folder)[1]["held_out"]
    text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    typer.echo(f"{folder}\nheld-out loss, nats per token: {text}")


@app.command()
def data(
    task: str = typer.Argument("hopper", help="hopper, halfcheetah or walker2d."),
    dataset: str = typer.Argument("collected:medium", help="Or d4rl:QUALITY, minari:ID, a path."),
    steps: int = typer.Option(None, help="Steps to collect, or to read at most."),
    seed: int = 0,
) -> None:
    """Collect (a function of SEED), download or open a data set, and summarise it."""
    from dtlib import data, storage, tasks

    storage.sweep_cache()
    typer.echo(data.load(dataset, tasks.get_task(task), steps=steps, seed=seed).summary())


@app.command()
def runs(
    name: str = typer.Argument("", help="Part of a run's name: shows settings and learning curve."),
    running: bool = typer.Option(False, "--running", help="List the unfinished ones."),
) -> None:
    """List the finished runs, or show some."""
    from dtlib.records import runs_root, unfinished
    from dtlib.runs import Run

    if running:
        return typer.echo("\n".join(unfinished()) or f"No unfinished run in {runs_root()}.")
    found = sorted(folder for folder in runs_root().glob("[!.]*/") if name in folder.name)
    typer.echo(f"{len(found)} finished runs in {runs_root()}")
    for folder in found:
        try:
            run = Run.open(folder)
            typer.echo(describe(run) if name else run.path.name)
        except UserError as error:  # one damaged run does not hide the others
            typer.echo(f"damaged: {error}")


HOPPER = "from dtlib.tasks import TASKS; e = TASKS['hopper'].make_environment({}); e.reset(); "
FRAME = HOPPER.format("render_mode='rgb_array'") + "print(e.render().any() or exit('black'))"
PROBES = [  # label, what needs it ("": all), code that prints a detail or exits with a reason
    ("torch", "", "import torch; print(torch.__version__)"),
    ("CUDA", "profiles gpu and paper", "import torch; print(torch.cuda.get_device_name())"),
    ("MuJoCo", "", HOPPER.format("") + "e.step([0, 0, 0]); print('moves Hopper')"),
    ("frames", "the pictures", FRAME),
]


@app.command()
def doctor() -> None:
    """Say what works here and what each profile lacks. Exits with 1 if the laptop's cannot run."""
    from dtlib.profiles import HOSTS, PROFILES, missing, unreachable
    from dtlib.storage import cache_root

    failed = set()

    def line(label: str, needed_by: str, works: bool, detail: str) -> None:
        failed.update([] if works else [needed_by])
        note = f" (only {needed_by} need it)" if needed_by and not works else ""
        typer.echo(f"{'[OK]' if works else '[FAIL]':<7}{label}: {detail}{note}")

    line("Python", "", True, f"{sys.version.split()[0]} at {sys.executable}")
    for label, needed_by, code in PROBES:  # in processes of their own, which may crash
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
        said = (done.stderr if done.returncode else done.stdout).strip()
        said = said or f"the process ended with status {done.returncode}"
        line(label, needed_by, done.returncode == 0, said.splitlines()[-1])
    cache = cache_root()
    root = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, writable = shutil.disk_usage(root).free / 1e9, os.access(root, os.W_OK)
    line("disk", "", free > 2 and writable, f"{free:.0f} GB free at {root}; needed: 2, writable")
    for host in HOSTS:
        reason = unreachable(host)
        line("network", "downloads of profile paper", not reason, f"{host} {reason or 'answers'}")
    for profile in PROFILES if "" not in failed else []:
        lacks = "; ".join(missing(profile))
        text = f"[FAIL] profile {profile} lacks {lacks}"
        typer.echo(text if lacks else f"[OK]   profile {profile}: ready")
    raise typer.Exit(int("" in failed))


if __name__ == "__main__":
    app(prog_name="python -m dtlib")
