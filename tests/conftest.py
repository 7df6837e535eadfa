"""Shared by the tests: a cache of their own, real Hopper data, and the notebooks' measures."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtlib.sources.collected import collect
from dtlib.tasks import get_task

torch.set_num_threads(1)  # as in every run on a CPU; faster for models this small, too


def cells(notebook: str, tag: str) -> SimpleNamespace:
    """What the cells of ``notebooks/<notebook>.ipynb`` with that tag define, executed in order.

    Such a cell imports what it needs itself. Raises ValueError where no cell has the tag.
    """
    path = Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb"
    found, scope = 0, {"__name__": notebook}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code" and tag in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), scope)
            found += 1
    if not found:
        raise ValueError(f"{path.name} has no cell tagged {tag!r}")
    return SimpleNamespace(**scope)


def output_until_all_ended(process, number: int, deadline: threading.Timer) -> str:
    """Send Ctrl-C (SIGINT) or a kill; return what the script and its workers printed until the end.

    All of them end within 30 seconds, and the script does not run again in a worker.
    """
    sent = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal: to the workers, too
    else:
        process.kill()
    output = process.communicate()[0]  # comes when the last process that could write has ended
    assert deadline.is_alive() and time.monotonic() - sent < 30
    deadline.cancel()
    assert "script\n" not in output and process.returncode in (-number, 1)
    return output


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of two processes each takes whole files; the notebooks, half of all the work, are divided."""
    for item in items:
        other = ("[02_", "[04_", "[07_", "[08_", "[11_", "add_up")
        slow = item.path.stem == "test_notebooks" and any(number in item.name for number in other)
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{' 2' * slow}"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test reads or writes the user's cache; child processes inherit the variable."""
    folder = tmp_path_factory.mktemp("cache")
    previous = os.environ.get("DTLIB_CACHE")
    os.environ["DTLIB_CACHE"] = str(folder)
    yield folder
    os.environ.pop("DTLIB_CACHE")
    if previous is not None:
        os.environ["DTLIB_CACHE"] = previous


@pytest.fixture(scope="session")
def hopper_file(cache):
    """A few hundred episodes of random actions in the real environment, in D4RL's layout."""
    return collect(get_task("hopper"), "random", 3000, seed=0, progress=False)
