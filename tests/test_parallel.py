"""Jobs in processes and threads: order, progress, Ctrl-C, killed workers, other backends."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import psutil
import pytest
import torch
from conftest import output_until_all_ended

from dtlib import parallel
from dtlib.errors import UserError
from dtlib.parallel import in_processes, in_threads, run_all

ROOT = Path(__file__).parents[1]
OPTIONS = {"total": 6, "description": "counting"}


@pytest.fixture
def bars(monkeypatch):
    """The bars that are shown; each keeps its numbers."""

    class Bar(parallel.tqdm):
        def __init__(self, **options):
            super().__init__(**options, file=open(os.devnull, "w"))  # noqa: SIM115
            self.options, self.seen = options, []
            bars.append(self)

        def update(self, steps=1):
            super().update(steps)
            self.seen.append(self.n)

    bars = []
    monkeypatch.setattr(parallel, "tqdm", Bar)
    return bars


def test_one_process_does_it_here(bars):
    seen = []

    def job(item, device, on_steps):
        on_steps(item)
        seen.append((item, device, os.getpid()))
        return -item

    assert run_all(job, [1, 2, 3], processes=1, **OPTIONS) == [-1, -2, -3]
    assert seen == [(item, "cpu", os.getpid()) for item in (1, 2, 3)]
    assert bars[0].n == 6 and bars[0].seen == [1, 3, 6]
    assert run_all(job, [2], **OPTIONS) == [-2] and seen[-1] == (2, "cpu", os.getpid())
    assert run_all(job, [], **OPTIONS) == []
    assert [bar.options["disable"] for bar in bars] == [False, False, True]


def step_by_step(item, device, on_steps):
    for _ in range(item):
        time.sleep(0.4)
        on_steps(1)
    return item, device, os.getpid()


def test_processes_keep_the_order_and_their_progress_is_shown(bars):
    found = run_all(step_by_step, [3, 1, 2], processes=2, **OPTIONS)
    assert [row[:2] for row in found] == [(3, "cpu"), (1, "cpu"), (2, "cpu")]
    workers = {pid for *_, pid in found}
    assert len(workers) == 2 and os.getpid() not in workers
    assert bars[0].n == 6 and len(set(bars[0].seen)) > 2  # while they run, too
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_items_are_taken_as_processes_become_free():
    taken = []
    items = map(lambda number: taken.append(number) or number, itertools.count())
    results = in_processes(lambda number: number**2, items, 2, "")
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.warns(UserWarning, match="tasks"):  # joblib's: some were still running
        results.close()
    assert len(taken) < 200


def test_more_processes_than_cards_are_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def job(item, device, on_steps):
        return item, device, os.getpid()

    found = run_all(job, [1, 2], device="cuda", processes=2, **OPTIONS)
    assert found == [(1, "cuda", os.getpid()), (2, "cuda", os.getpid())]


def test_every_card_has_one_job_at_a_time(monkeypatch):
    """In threads, as there are no cards here: another backend that a user can choose."""
    chosen, busy = threading.local(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: setattr(chosen, "card", card))

    def job(item, device, on_steps):
        assert chosen.card not in busy
        busy.append(chosen.card)
        time.sleep(0.05)
        busy.remove(chosen.card)
        return item, chosen.card

    with joblib.parallel_config("threading"):
        found = run_all(job, list(range(9)), device="cuda", processes=5, **OPTIONS)
    assert [item for item, _ in found] == list(range(9))
    assert {card for _, card in found} == {0, 1, 2}


def test_a_user_can_choose_threads(bars):
    with joblib.parallel_config("threading"):
        found = run_all(step_by_step, [1, 2, 3], processes=3, **OPTIONS)
    assert found == [(item, "cpu", os.getpid()) for item in (1, 2, 3)]
    assert bars[0].n == 6


def killed(item, device, on_steps):
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def test_a_killed_worker_is_a_user_error():
    """In another thread, too: only the main one may say what Ctrl-C does."""
    before, errors = signal.getsignal(signal.SIGINT), []

    def attempt():
        try:
            run_all(killed, [0, 1], processes=2, **OPTIONS)
        except UserError as error:
            errors.append(str(error))

    attempt()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(200)
    assert len(errors) == 2 and "A worker process was killed" in errors[0]
    assert "try processes=1" in errors[0] and signal.getsignal(signal.SIGINT) is before


def test_workers_that_cannot_start_say_what_to_try_and_leave_ctrl_c(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no more processes")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(joblib, "Parallel", fail)
    with pytest.raises(UserError, match="Cannot start worker .*no more.*: try processes=1"):
        run_all(step_by_step, [1, 2], processes=2, **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is before


def wrong(item, device, on_steps):
    raise UserError(f"{item} is wrong")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_job_is_raised_here(processes):
    with pytest.raises(UserError, match="7 is wrong"):
        run_all(wrong, [7, 7], processes=processes, **OPTIONS)


# A script without the usual guard around its main part.
SCRIPT = r"""
import os, time
from dtlib import parallel
def job(item, device, on_steps):
    os.write(1, b"working\n")  # at once, whatever the other one writes
    time.sleep(1000)
print("script", flush=True)
parallel.run_all(job, [1, 2], total=2, description="", processes=2, progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("working", [False, True])
def test_workers_end_with_their_parent(tmp_path, number, working):
    """At once, whether they work already or have only been started."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    deadline.start()
    assert process.stdout.readline() == "script\n"
    if working:
        assert [process.stdout.readline().split()[0] for _ in range(2)] == ["working"] * 2
    else:
        while len(workers_of(process.pid)) < 2:
            time.sleep(0.02)
        time.sleep(0.3)  # the parent, which was deaf meanwhile, hears again
    output = output_until_all_ended(process, number, deadline)
    if number == signal.SIGINT:  # the parent's traceback and no worker's
        assert "KeyboardInterrupt" in output and output.count("Traceback") == 1


def workers_of(pid):
    """Children that are about to run jobs."""
    children = psutil.Process(pid).children()
    return [child for child in children if "popen_loky_posix" in " ".join(child.cmdline())]


def test_numbers_of_threads_do_not_depend_on_the_number_of_cores():
    """MKL counts for each thread: the first products of a new one took all cores."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    pairs = [
        (torch.randn(90 + i, n, generator=generator), torch.randn(n, 300 + i, generator=generator))
        for i, n in enumerate(range(1000, 1040))
    ]

    def job(_):
        return [(a @ b).sum().item() for a, b in pairs]

    try:
        torch.set_num_threads(1)
        alone = job(0)
        torch.set_num_threads(2)
        assert in_threads(job, range(2), "cpu") == [alone, alone]
    finally:
        torch.set_num_threads(before)


def test_threads_keep_the_order_and_have_one_core_each():
    before = torch.get_num_threads()

    def job(number):
        time.sleep(0.02 * (number == 0))  # the first ends last
        return number, torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        assert in_threads(job, range(4), "cpu") == [(number, 1) for number in range(4)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda number: 1 / number, [1, 0], "cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
