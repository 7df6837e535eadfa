"""Jobs in worker processes and in threads. joblib.parallel_config chooses another backend."""

import contextlib
import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky import get_reusable_executor

from dtlib.devices import choose_device
from dtlib.errors import UserError, explained
from dtlib.progress import tqdm
from dtlib.storage import temporary_folder

ADDRESS = "DTLIB_SCHEDULER"  # in the environment: the Dask scheduler that runs go to


def run_all(
    job: Callable,
    items: list,
    total: int,
    description: str,
    device: str = "cpu",
    processes: int | None = None,
    progress: bool = True,
) -> list:
    """Return ``job(item, device, on_steps)`` of each item, in order: one a core or a card at once.

    A progress bar of ``total`` counts what jobs give to ``on_steps``. With one of ``processes``, or
    one item, all happens in this process. Where DTLIB_SCHEDULER names a Dask scheduler, its workers
    do it on their devices. Raises UserError for an absent device and when a worker is killed.
    """
    if items and os.environ.get(ADDRESS):
        from dtlib import cluster  # needs Dask

        return cluster.run_all(job, items, description)
    device = choose_device(device)
    number = min(processes or joblib.effective_n_jobs(-1), len(items))
    if device == "cuda":
        number = min(number, torch.cuda.device_count())
    with tqdm(total=total, desc=description, unit="step", disable=not (progress and items)) as bar:
        if number <= 1:
            return [job(item, device, bar.update) for item in items]
        with temporary_folder() as folder, _shown(bar, folder):
            work = functools.partial(_work, job, device, Path(folder))
            return list(in_processes(work, enumerate(items), number, "try processes=1"))


def in_processes(job: Callable, items: Iterable, processes: int, advice: str) -> Iterator:
    """Yield ``job(item)`` of each item, in order. With one of ``processes``: computed here.

    An item is taken when a process is free for it. Workers ignore Ctrl-C, and exit with this
    process or with the iterator. Raises UserError, with ``advice``, when one is killed.
    """
    if processes <= 1:
        yield from map(job, items)
        return
    options = {"return_as": "generator", "batch_size": 1, "pre_dispatch": "n_jobs"}
    options |= {"initializer": _begin, "initargs": (os.getpid(),), "max_nbytes": None}
    warnings.filterwarnings("ignore", "A worker stopped")  # it grew, and is replaced
    main = threading.current_thread() is threading.main_thread()  # no other may ignore Ctrl-C
    before = main and signal.signal(signal.SIGINT, signal.SIG_IGN)  # they start so
    try:
        with explained("Cannot start worker processes", advice, OSError):
            results = joblib.Parallel(processes, **options)(map(joblib.delayed(job), items))
    finally:
        main and signal.signal(signal.SIGINT, before)
    try:
        yield from results
    except BrokenProcessPool as error:
        what = "A worker process was killed, perhaps for lack of memory"
        raise UserError(f"{what}: {advice}.") from error
    finally:
        results.close()
        get_reusable_executor(reuse=True).shutdown()


def _begin(parent: int) -> None:
    """In a worker: ignore Ctrl-C, and exit within a second of the parent's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Callable, device: str, folder: Path, numbered: tuple[int, object]) -> object:
    """Run one job; the size of its file in ``folder`` is the number of its steps so far."""
    number, item = numbered
    with open(folder / f"{number}.steps", "wb") as file, contextlib.ExitStack() as held:
        for card in range(torch.cuda.device_count() if device == "cuda" else 0):
            with contextlib.suppress(Timeout):  # another job uses this card
                held.enter_context(FileLock(folder / f"card{card}").acquire(timeout=0))
                torch.cuda.set_device(card)
                break
        return job(item, device, lambda steps: file.truncate(file.seek(steps, os.SEEK_CUR)))


@contextlib.contextmanager
def _shown(bar: tqdm, folder: str) -> Iterator[None]:
    """Show the sum of all jobs' steps, twice a second."""
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(0.5):
            done = sum(file.stat().st_size for file in Path(folder).glob("*.steps"))
            if done > bar.n:
                bar.update(done - bar.n)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
        bar.update(bar.total - bar.n)
    finally:
        ended.set()
        thread.join()


def in_threads(job: Callable, items: Iterable, device: str) -> list:
    """Return ``job(item)`` of each item, in order. Jobs must not use torch's global generator.

    On a CPU each job has one core, so that numbers do not depend on how many there are.
    """
    threads = joblib.cpu_count() if device == "cpu" else 1

    def alone(item: object) -> object:
        with one_thread(device):  # MKL keeps a number for each thread
            return job(item)

    with one_thread(device):
        return joblib.Parallel(threads, backend="threading")(map(joblib.delayed(alone), items))


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Give torch one thread on a CPU, so that bytes do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
