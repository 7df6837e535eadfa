"""Decision Transformers from pre-trained starting points: data, fine-tuning, figures."""

import os
import shutil
import subprocess
import sys

import typer

from dtlib.errors import UserError, cache_root  # commands import the rest when they run, so that --help is quick


class Commands(typer.core.TyperGroup):
    def invoke(self, context: object) -> object:
        """Run a command; show what a user can put right as one line, and an interrupt as what it is."""
        try:
            return super().invoke(context)
        except (UserError, NotADirectoryError, FileExistsError, PermissionError, KeyboardInterrupt) as error:
            wrong = not isinstance(error, KeyboardInterrupt)
            typer.echo(f"Error: {error}" if wrong else "\nInterrupted; run the same command again to resume.", err=True)
            raise typer.Exit(2 if wrong else 130) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False, help=__doc__)


def describe(run: object) -> str:
    """A run's folder, its settings and, epoch by epoch, its action error, mean return and normalised scores."""
    from dtlib.tasks import get_task
    lines = [str(run.path), " ".join(f"{name}={value}" for name, value in vars(run.config).items())]
    for row in run.metrics:
        mean = sum(row["returns"]) / len(row["returns"])
        scores = "".join(f"   {name} {score:>5.1f}" for name, score in get_task(run.config.task).scores(mean).items())
        lines.append(f"epoch {row['epoch']:>3}   action error {row['action_error']:.4f}   return {mean:>7.1f}{scores}")
    return "\n".join(lines)


@app.command()
def figures(notebooks: list[str] = typer.Argument(None, help="Numbers or names, such as 00 03; all by default."),
            profile: str = typer.Option("laptop", help="smoke, laptop, full, gpu or paper."), figures: str = "figures",
            settings: list[str] = typer.Option(None, "--set", help="name=value of a parameter; repeatable."),
            plan: bool = typer.Option(False, "--plan", help="Say what it would cost, and stop.")) -> None:
    """Run the notebooks; write figures and their numbers into FIGURES/PROFILE/NOTEBOOK."""
    from dtlib import batch
    batch.run(profile, notebooks, dict(item.partition("=")[::2] for item in settings or []), figures, plan)


@app.command()
def finetune(settings: list[str] = typer.Argument(None, help="name=value, e.g. size=mini seed=0,1; none: list them."),
             device: str = "auto", processes: int = typer.Option(None, help="How many on a CPU; default: one a core")) -> None:
    """Train, resume or find runs on DEVICE (auto, cpu, cuda), several seeds side by side; print their learning curves."""
    from dtlib import batch, runs
    if not settings:
        return typer.echo("\n".join(f"{name}={value}" for name, value in vars(runs.RunConfig()).items()))
    values = {name: batch.convert(name, text, None) for name, _, text in (item.partition("=") for item in settings)}
    seeds = values.pop("seed", 0)
    configs = [runs.RunConfig(**values, seed=seed) for seed in (seeds if isinstance(seeds, (list, tuple)) else [seeds])]
    for run in runs.fine_tuned(configs, device, processes):
        typer.echo(describe(run))


@app.command()
def pretrain(kind: str = typer.Argument(help="language, image, markov or iid."),
             size: str = typer.Option("mini", help="tiny, mini, chibit, small, gpt2, imagegpt or atari."), seed: int = 0,
             corpus: str = typer.Option("", help="python, wikitext-2, wikitext-103, a folder of text or CIFAR-10's "
                                                 "binary files; empty: what every install has."),
             settings: list[str] = typer.Option(None, "--set", help="name=value, e.g. steps=1000; repeatable."),
             out: str = typer.Option(None, help="Folder; default: in the cache, where runs find it."),
             device: str = "auto") -> None:
    """Make a starting point, or go on with an interrupted one; print where it is and its held-out loss."""
    from pathlib import Path

    from dtlib import batch, pretrain
    values = {name: batch.convert(name, text, None) for name, _, text in (item.partition("=") for item in settings or [])}
    config = pretrain.PretrainConfig(**{"kind": kind, "size": size, "seed": seed, "corpus": corpus, **values})
    folder = pretrain.pretrain(config, out and Path(out), device)
    losses = pretrain.load_starting_point(folder)[1]["held_out"]
    typer.echo(f"{folder}\nheld-out loss, nats per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


@app.command()
def data(task: str = typer.Argument("hopper", help="hopper, halfcheetah or walker2d."),
         dataset: str = typer.Argument("collected:medium", help="collected:QUALITY, d4rl:QUALITY, minari:ID, a path."),
         steps: int = typer.Option(None, help="Steps to collect, or to read at most."), seed: int = 0) -> None:
    """Collect (a function of SEED), download or open a data set, and summarise it."""
    from dtlib import data, tasks
    typer.echo(data.load(dataset, tasks.get_task(task), steps=steps, seed=seed).summary())


@app.command()
def runs(name: str = typer.Argument("", help="Any part of a run's name: shows its settings and learning curve.")) -> None:
    """List the finished runs, or show some."""
    from dtlib.runs import Run, runs_root
    found = sorted(folder for folder in runs_root().glob("[!.]*/") if name in folder.name)
    typer.echo(f"{len(found)} finished runs in {runs_root()}")
    for folder in found:
        try:
            typer.echo(describe(Run.open(folder)) if name else Run.open(folder).path.name)
        except UserError as error:  # one damaged run does not hide the others
            typer.echo(f"damaged: {error}")


HOPPER = "from dtlib.tasks import get_task; env = get_task('hopper').make_environment({}); env.reset(seed=0); "
PROBES = [  # label, what needs it (empty: everything), code that prints a detail or exits with the reason why not
    ("torch", "", "import torch, transformers; print(torch.__version__, 'and transformers', transformers.__version__)"),
    ("CUDA", "profiles gpu and paper", "import torch; print(torch.cuda.get_device_name())"),
    ("MuJoCo", "", HOPPER.format("") + "env.step([0, 0, 0]); import mujoco as m; print(m.__version__, 'moves Hopper')"),
    ("frames", "the pictures", HOPPER.format("render_mode='rgb_array'") + "env.render().any() or exit('black'); print('ok')"),
]


@app.command()
def doctor() -> None:
    """Say what works here and what each profile lacks. The exit status is 1 if the laptop profile cannot run."""
    from dtlib.profiles import HOSTS, PROFILES, missing, unreachable
    failed = set()
    def line(label: str, needed_by: str, works: bool, detail: str) -> None:
        failed.update([] if works else [needed_by])
        note = f" (only {needed_by} need it)" if needed_by and not works else ""
        typer.echo(f"{'[OK]' if works else '[FAIL]':<7}{label}: {detail}{note}")
    line("Python", "", sys.version_info >= (3, 11), f"{sys.version.split()[0]} at {sys.executable}; needed: 3.11")
    for label, needed_by, code in PROBES:  # each in its own process, so that a crash in a library ends only that
        environment = {"MUJOCO_GL": "egl" if sys.platform == "linux" else "glfw", **os.environ}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        said = (done.stderr if done.returncode else done.stdout).strip() or f"the process ended with status {done.returncode}"
        line(label, needed_by, done.returncode == 0, said.splitlines()[-1])
    root = next(folder for folder in (cache_root(), *cache_root().absolute().parents) if folder.exists())
    free = shutil.disk_usage(root).free / 1e9
    line("disk", "", free > 2 and os.access(root, os.W_OK), f"{free:.0f} GB free at {root}; needed: 2 GB, writable")
    for folder, pattern in ((cache_root() / "data", "*.hdf5"), (cache_root() / "runs", "*/run.json")):
        line("cache", "", True, f"{len(list(folder.glob(pattern)))} in {folder}")
    for host in HOSTS:
        line("network", "downloads of profile paper", not unreachable(host), f"{host} {unreachable(host) or 'answers'}")
    for profile in PROFILES if "" not in failed else []:
        lacks = "; ".join(missing(profile))
        typer.echo(f"[FAIL] profile {profile} lacks {lacks}" if lacks else f"[OK]   profile {profile}: ready")
    raise typer.Exit(int("" in failed))


if __name__ == "__main__":
    app(prog_name="python -m dtlib")
