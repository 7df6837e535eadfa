"""The Dockerfile: built where Docker answers, read by a linter elsewhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def answers(*command):
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True)


def test_the_image_can_be_built_or_the_linter_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    if (docker := answers("docker", "info")) and docker.returncode == 0:
        command = ["docker", "build", "--quiet", "--tag", "dtlib-test", "."]
    elif linter.exists():
        command = [linter, "Dockerfile"]
    else:
        pytest.skip("neither Docker nor hadolint is here")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_the_tested_pytorch_and_python():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    assert f" {torch} " in text and "FROM python:3.11-" in text
