"""The command line: quick help, one line for what the user can put right, each command once."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import dtlib.__main__ as command_line
from dtlib import batch
from dtlib.profiles import PROFILES


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command line in an empty repository with an empty cache."""
    (tmp_path / "repository" / "notebooks").mkdir(parents=True)
    (tmp_path / "repository" / "pyproject.toml").touch()
    parameters = 'profile = "laptop"\noverrides = {}\nsteps = 3'
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    path = tmp_path / "repository" / "notebooks" / "00_first.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    return lambda *arguments: CliRunner().invoke(command_line.app, arguments)


def test_help_names_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys, dtlib.__main__ as m\n"
        "heavy = ('torch', 'numpy', 'matplotlib', 'papermill')\n"
        "try: m.app(['--help'])\n"
        "finally: print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("figures", "finetune", "pretrain", "data", "runs", "doctor"):
        assert name in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["figures", "--profile", "desktop"],
            "Unknown profile 'desktop': the profiles are full, g",
        ),
        (["figures", "9"], "Unknown notebook '9': the notebooks are 00_first."),
        (
            ["figures", "--set", "epoch=1"],
            "Unknown parameter 'epoch': the parameters are action_head",
        ),
        (
            ["figures", "--set", "steps=1e-4"],
            "Parameter steps got 0.0001: expected int, such as 3.",
        ),
        (["figures", "--set", "steps"], "Parameter steps got '': expected int, such as 3."),
        (
            ["figures", "--set", "epochs=1e-4"],
            "Parameter epochs=0.0001: Input should be a valid in",
        ),
        (["finetune", "epoch=2"], "Parameter epoch="),
        (["finetune", "seed="], "Parameter seed got no number"),
        (["finetune", "seed=0", "seed=1"], "Parameter seed is given twice"),
        (["compare", "--profile", "desktop"], "Unknown profile 'desktop': the profiles are "),
        (["compare", "--profile", ".."], "Unknown profile '..': the profiles are "),
        (["compare", "--figures", "none"], "There is no folder "),
        (["finetune", "epochs=many"], "Parameter epochs='many'"),
        (["finetune", "task=ant"], "Unknown task 'ant'"),
        (["pretrain", "music"], "Parameter kind='music'"),
        (["pretrain", "iid", "--set", "steps=many"], "Parameter steps='many'"),
        (["data", "ant"], "Unknown task 'ant'"),
        (["data", "hopper", "collected:good"], "collected:good"),
    ],
)
def test_user_errors_are_one_line_with_status_2_and_leave_nothing(
    call, tmp_path, arguments, message
):
    before = sorted(tmp_path.rglob("*"))
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_where_a_folder_must_be_is_one_line(call, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("DTLIB_CACHE", str(file))
    for arguments in (
        ["pretrain", "iid", "--set", "steps=1", "--out", str(file / "x")],
        ["figures", "smoke-test", "--figures", str(file)],
        ["data", "hopper", "collected:random"],
    ):
        result = call(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.splitlines()[-1].startswith("Error: "), arguments


def test_figures_passes_on_what_was_asked(call, monkeypatch):
    asked = []
    monkeypatch.setattr(batch, "run", lambda *arguments: asked.append(arguments))
    texts = ["a=1", "b=x=y"]
    options = ["--profile", "smoke", "--set", texts[0], "--set", texts[1]]
    assert call("figures", "00", "03", *options).exit_code == 0
    assert call("figures", "--figures", "elsewhere", "--plan").exit_code == 0
    jobs = '{"jobs": 2}'
    assert call("figures", "--scheduler", "tcp://a:1", "--slurm", jobs).exit_code == 0
    assert asked[0] == ("smoke", ["00", "03"], texts, "figures", False, "", "")
    assert asked[1][0] == "laptop" and not asked[1][1]
    assert asked[1][2:5] == ([], str(Path.cwd() / "elsewhere"), True)
    assert asked[2][5:] == ("tcp://a:1", jobs)


def test_an_interrupt_says_how_to_go_on(call, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    def lazily(*arguments):  # as a library that imports when a name is first used
        try:
            interrupt()
        except KeyboardInterrupt:
            raise ModuleNotFoundError from None

    for run in (interrupt, lazily):
        monkeypatch.setattr(batch, "run", run)
        result = call("figures")
        assert result.exit_code == 130
        assert "run the same command again to resume" in result.stderr


def test_an_interrupt_of_the_first_imports_is_one_sentence(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(Path(command_line.__file__).parents[1])])
    command, about = [sys.executable, "-m", "dtlib", "runs"], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=about, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == command_line.INTERRUPTED + "\n"


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dtlib", "finetune"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 1


RUN = {
    "dataset": "collected:random",
    "dataset_steps": 600,
    "size": "chibit",
    "context": 2,
    "epochs": 1,
    "steps_per_epoch": 1,
    "batch_size": 2,
    "learning_rate": "1e-4",
    "dropout": "0,0.0,0",
    "evaluation_episodes": 1,
    "gradient_clip": "none",
    "learning_rate_decay": "true",
    "seed": 7,
}


def test_data_then_finetune_then_runs(call, tmp_path):
    result = call("data", "hopper", "collected:random", "--steps", "600")
    assert result.exit_code == 0, result.output
    assert "episodes" in result.stdout and "return" in result.stdout
    settings = [f"{name}={value}" for name, value in RUN.items()]
    result = call("finetune", *settings, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "D4RL" in result.stdout and "Takagi" in result.stdout
    rows = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("epoch")]
    assert rows == ["0", "1"]
    head, name = call("runs").stdout.splitlines()
    assert head == f"1 finished runs in {tmp_path / 'cache' / 'runs'}"
    shown = call("runs", name[-6:]).stdout
    assert "learning_rate=0.0001" in shown and "seed=7" in shown and "Takagi" in shown
    assert "gradient_clip=None" in shown and "learning_rate_decay=True" in shown
    damaged = tmp_path / "cache" / "runs" / "aaa-damaged"
    damaged.mkdir()
    (damaged / "run.json").write_text("{}")
    lines = call("runs").stdout.splitlines()
    assert lines[1].startswith("damaged: ") and str(damaged) in lines[1] and lines[2] == name
    assert call("runs", "of no run").stdout.startswith("0 finished runs in")


def test_pretrain_makes_a_starting_point_once(call, tmp_path):
    asked = ["pretrain", "markov", "--size", "chibit", "--seed", "4"]
    asked += ["--set", "steps=9", "--set", "sequence=4"]
    first, again = call(*asked), call(*asked)
    assert first.exit_code == 0, first.output
    place, losses = first.stdout.splitlines()
    assert place == str(tmp_path / "cache" / "starting_points" / "markov-chibit-seed4")
    assert first.stdout == again.stdout
    assert losses.startswith("held-out loss, nats per token: model 4.")
    assert "uniform 4.6052" in losses
    other = call(*asked, "--set", "batch_size=3")
    assert other.exit_code == 2 and "holds something else" in other.stderr


def test_finetune_without_settings_lists_them(call):
    result = call("finetune")
    assert result.exit_code == 0
    shown = set(result.stdout.splitlines())
    assert {"learning_rate=0.0001", "warmup_steps=5000", "time_embedding_std=1.0"} < shown
    assert call("runs").stdout.startswith("0 finished runs in")


def doctored(monkeypatch, *probes):
    monkeypatch.setattr(command_line, "PROBES", list(probes))
    monkeypatch.setattr("dtlib.profiles.unreachable", lambda address: "no network")


def test_doctor_survives_crashes_and_fails_only_for_what_everything_needs(call, monkeypatch):
    crash = "import os; os.abort()"
    doctored(monkeypatch, ("good", "", "print('fine')"), ("pictures", "a picture", crash))
    result = call("doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "[OK]   good: fine" in lines
    failed = {line.split()[1]: line for line in lines if line.startswith("[FAIL]")}
    assert "the process ended with status" in failed["pictures:"]
    assert "only a picture" in failed["pictures:"]
    assert "no network" in failed["network:"] and "profile paper" in failed["network:"]
    of_profiles = [line for line in lines if line.split()[1] == "profile"]
    assert {line.split()[2].strip(":") for line in of_profiles} == set(PROFILES)
    (paper,) = [line for line in of_profiles if "profile paper" in line]
    assert paper.startswith("[FAIL] profile paper lacks") and "hopper_medium-v2.hdf5" in paper
    doctored(monkeypatch, ("broken", "", "exit('a reason')"))
    result = call("doctor")
    assert result.exit_code == 1
    assert "[FAIL] broken: a reason" in result.stdout.splitlines()


def test_what_doctor_requires_works_here(call, monkeypatch):
    required = [probe for probe in command_line.PROBES if not probe[1]]
    assert [label for label, *_ in required] == ["torch", "MuJoCo"]
    doctored(monkeypatch, *required)
    # The current folder is another one.
    monkeypatch.setenv("PYTHONPATH", str(Path(command_line.__file__).parents[1]))
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "[OK]   torch: " in result.stdout and "moves Hopper" in result.stdout
