"""The command line: quick help, one line for what the user can put right, and each command once."""

import subprocess
import sys

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
    cell = nbformat.v4.new_code_cell('profile = "laptop"\nepochs = 3', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "repository" / "notebooks" / "00_first.ipynb")
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    return lambda *arguments: CliRunner().invoke(command_line.app, arguments)


def test_help_names_the_commands_and_imports_nothing_heavy():
    code = ("import sys, dtlib.__main__ as m\ntry: m.app(['--help'])\n"
            "finally: print([name for name in ('torch', 'numpy', 'matplotlib', 'papermill') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("figures", "finetune", "data", "runs", "doctor"))
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(("arguments", "message"), [
    (["figures", "--profile", "desktop"], "Unknown profile 'desktop': the profiles are smoke, laptop, full, gpu"),
    (["figures", "9"], "Unknown notebook '9': the notebooks are 00_first."),
    (["figures", "--set", "epoch=1"], "Unknown parameter 'epoch': the parameters are epochs."),
    (["figures", "--set", "epochs=1e-4"], "Parameter epochs got '1e-4': expected int, such as 3."),
    (["figures", "--set", "epochs"], "Cannot read 'epochs': expected name=value, such as epochs=2."),
    (["finetune", "epoch=2"], "Unknown run parameter 'epoch'"),
    (["finetune", "epochs=many"], "Run parameter epochs is 'many'"),
    (["finetune", "task=ant"], "Unknown task 'ant'"),
    (["data", "ant"], "Unknown task 'ant'"),
    (["data", "hopper", "collected:good"], "collected:good"),
    (["runs", "abc"], "0 runs match 'abc'"),
])
def test_user_errors_are_one_line_with_status_2_and_leave_nothing(call, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_figures_passes_on_what_was_asked(call, monkeypatch):
    asked = []
    monkeypatch.setattr(batch, "run", lambda *arguments: asked.append(arguments))
    assert call("figures", "00", "03", "--profile", "smoke", "--set", "a=1", "--set", "b=x=y").exit_code == 0
    assert call("figures", "--figures", "elsewhere").exit_code == 0
    assert asked[0] == ("smoke", ["00", "03"], {"a": "1", "b": "x=y"}, "figures")
    assert asked[1][0] == "laptop" and not asked[1][1] and asked[1][2:] == ({}, "elsewhere")


def test_an_interrupt_says_how_to_go_on(call, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(batch, "run", interrupt)
    result = call("figures")
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.stderr


def test_data_then_finetune_then_runs(call, tmp_path):
    result = call("data", "hopper", "collected:random", "--steps", "600")
    assert result.exit_code == 0, result.output
    assert "episodes" in result.stdout and "return" in result.stdout
    settings = ["dataset=collected:random", "dataset_steps=600", "size=chibit", "context=2", "epochs=1",
                "steps_per_epoch=1", "batch_size=2", "learning_rate=1e-4", "evaluation_episodes=1", "seed=7"]
    result = call("finetune", *settings, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "D4RL" in result.stdout and "Takagi" in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert rows == ["0", "1"]
    (name,) = call("runs").stdout.split()
    shown = call("runs", name[-6:])
    assert "learning_rate=0.0001" in shown.stdout and "seed=7" in shown.stdout and "Takagi" in shown.stdout


def test_finetune_without_settings_lists_them(call):
    result = call("finetune")
    assert result.exit_code == 0
    assert "learning_rate=0.0001" in result.stdout.splitlines()
    assert call("runs").stdout.startswith("No finished runs in")


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
    assert "the process ended with status" in failed["pictures:"] and "only a picture" in failed["pictures:"]
    assert "no network" in failed["network:"] and "profile paper" in failed["network:"]
    assert {line.split()[2].strip(":") for line in lines if line.split()[1] == "profile"} == set(PROFILES)
    assert any(line.startswith("[FAIL] profile paper lacks") and "hopper_medium-v2.hdf5" in line for line in lines)
    doctored(monkeypatch, ("broken", "", "exit('a reason')"))
    result = call("doctor")
    assert result.exit_code == 1
    assert "[FAIL] broken: a reason" in result.stdout.splitlines()


@pytest.mark.parametrize("label", ["torch", "MuJoCo"])
def test_what_doctor_requires_works_here(label):
    (code,) = [code for name, needed_by, code in command_line.PROBES if name == label and not needed_by]
    works, detail = command_line.probe(code)
    assert works, detail
