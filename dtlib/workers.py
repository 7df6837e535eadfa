"""Processes and threads beside this one; the processes are deaf to Ctrl-C, the parent's to handle, and gone when it is."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType

import joblib
import torch
from tqdm import tqdm

from dtlib.errors import UserError

_shared = []  # in a worker: its parent's ``steps`` and ``stopped``


class Workers(ProcessPoolExecutor):
    """``number`` processes, stopped on leaving the block; ``UserError`` with ``advice`` where one was killed. ``steps``
    counts what they ``report``; once ``stopped`` is set, that ends their work."""

    def __init__(self, number: int, advice: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.advice, self.steps, self.stopped = advice, context.Value("q"), context.RawValue("b")
        super().__init__(number, context, _begin, (self.steps, self.stopped))
        main, handler = sys.modules["__main__"], None
        try:
            with contextlib.suppress(ValueError):  # Python lets only the main thread do it
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited even while they start
            sys.modules["__main__"] = ModuleType("__main__")  # else each would run the user's script again
            for _ in range(number):  # each submission starts one
                self.submit(os.getpid)
        finally:
            sys.modules["__main__"] = main
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.stopped.value = True
        self.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(f"A worker process was killed, perhaps for lack of memory: {self.advice}.") from error


def _begin(*shared: object) -> None:
    _shared.extend(shared)
    end_with_parent()


def end_with_parent() -> None:
    """In a process that multiprocessing started: end it as soon as the one that asked for it is gone."""
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()


def report(done: int) -> None:
    """In a worker: add to the parent's ``steps``; KeyboardInterrupt once it has left the block. Elsewhere: nothing."""
    if _shared:
        steps, stopped = _shared
        with steps:
            steps.value += done
        if stopped.value:
            raise KeyboardInterrupt


def spread(job: Callable, items: list, device: str, processes: int | None, bar: tqdm) -> None:
    """``job(item, device, on_steps)`` for each of ``items``, several at once: one a core that this process may use, or one a
    card.

    ``bar`` counts what they give to ``on_steps``. With one of ``processes``, or one item, all happens in this one.
    """
    if device == "cuda":
        processes = min(processes or torch.cuda.device_count(), torch.cuda.device_count())
    processes = min(processes or joblib.cpu_count(), len(items))
    if processes <= 1:
        for item in items:
            job(item, device, bar.update)
        return
    with Workers(processes, "try processes=1") as pool:
        waiting, free, pending = list(items), list(range(processes)), {}
        while waiting or pending:
            while waiting and free:
                card = free.pop()
                pending[pool.submit(_on_card, job, waiting.pop(0), device, card)] = card
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(pool.steps.get_obj().value - bar.n)  # without its lock, which a killed worker may hold
            for future in done:
                free.append(pending.pop(future))
                future.result()


def _on_card(job: Callable, item: object, device: str, card: int) -> None:
    if device == "cuda":
        torch.cuda.set_device(card)
    job(item, device, report)


def in_threads(job: Callable, jobs: Iterable, device: str) -> list:
    """What ``job`` returns for each of ``jobs``, in order; none may draw from torch's global generator.

    On a CPU there is a thread a core and each job has one, so that numbers do not depend on how many cores there are.
    """
    with one_thread(device), ThreadPoolExecutor(joblib.cpu_count() if device == "cpu" else 1) as pool:
        return list(pool.map(job, jobs))


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Torch has one thread if ``device`` is the CPU, so that bytes do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
