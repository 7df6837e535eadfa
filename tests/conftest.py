"""Shared by the tests: a cache of their own, and real Hopper data collected into it once."""

import os

import pytest
import torch

from dtlib.collect import collect
from dtlib.tasks import get_task

torch.set_num_threads(1)  # as every run on a CPU has; faster for models this small, too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of two processes each takes whole files, but for the notebooks, half of all the work, which are divided."""
    for item in items:
        other = ("[02_", "[04_", "[07_", "[08_", "[11_")
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
    """A few hundred episodes of uniformly random actions in the real environment, in D4RL's layout."""
    return collect(get_task("hopper"), "random", 3000, seed=0, progress=False)
