"""Runs on many machines: Dask gives each one to a worker, and all of them share DTLIB_CACHE.

Joblib's backend for Dask does not say which run is at work, and ends all with the first error.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import platform
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from dtlib.config import RunConfig
from dtlib.devices import choose_device
from dtlib.errors import UserError, explained
from dtlib.parallel import ADDRESS
from dtlib.progress import tqdm
from dtlib.records import run_folder
from dtlib.storage import CODE, cache_root, locked, temporary_name, versions

INSTALL = "`pip install -e '.[cluster]'` here and on them"
with explained("Work on other machines needs Dask", INSTALL, ImportError):
    import dask
    from distributed import Client
    from distributed.comm import connect
    from distributed.scheduler import KilledWorker
    from distributed.security import Security

AGAIN = "give the same command again: finished runs and epochs are kept"
PATIENCE = 10  # seconds for the scheduler to answer
TRIES = 20  # workers that a run may lose; it goes on from its last epoch with each


@contextlib.contextmanager
def connected(scheduler: str, slurm: str = "") -> Iterator[None]:
    """Send all runs inside the ``with`` to ``scheduler``, or to Slurm jobs that are started here.

    ``slurm``: JSON of "jobs" (their number) and arguments of SLURMCluster. Raises UserError.
    """
    with contextlib.ExitStack() as stack:
        if slurm:
            scheduler = stack.enter_context(_slurm_jobs(slurm)).scheduler_address
        client = stack.enter_context(_client(scheduler))
        print(f"Runs go to {scheduler}; what its workers do: {client.dashboard_link}", flush=True)
        check_workers(client)
        stack.callback(os.environ.pop, ADDRESS, None)
        os.environ[ADDRESS] = scheduler
        yield


def _slurm_jobs(text: str) -> object:
    """Return a scheduler in this process that keeps Slurm jobs with one worker a core running."""
    before = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import SLURMCluster

    signal.signal(signal.SIGINT, before)  # its import would let Ctrl-C exit without a word
    cache = f"export DTLIB_CACHE={str(cache_root())!r}"
    options = {"cores": 1, "memory": "4GB", "job_script_prologue": [cache]}
    options["log_directory"] = str(cache_root() / "logs")
    example = """'{"jobs": 4, "queue": "gpu", "walltime": "04:00:00"}'"""
    advice = f"expected JSON with jobs and arguments of SLURMCluster, as {example}"
    with explained(f"--slurm {text}", advice, ValueError, TypeError):
        options |= json.loads(text)
        jobs = options.pop("jobs", 1)
        dask.config.set({"distributed.scheduler.allowed-failures": TRIES})
        cluster = SLURMCluster(**{"processes": options["cores"]} | options)
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # a job that ends is started again
        return cluster


def _client(scheduler: str) -> Client:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # run_all says what is wrong
    advice = "start one with `dask scheduler`, which prints its address, as tcp://10.0.0.1:8786"
    with explained(f"No Dask scheduler answers at {scheduler!r}", advice, Exception):
        with ThreadPoolExecutor(1) as beside:  # a notebook's own thread runs a loop already
            beside.submit(asyncio.run, _greet(scheduler)).result()  # a failed Client waits 20 s
        return Client(scheduler, timeout=PATIENCE, set_as_default=False)


async def _greet(scheduler: str) -> None:
    security = Security().get_connection_args("client")
    call = connect(scheduler, timeout=PATIENCE, **security)  # which waits for a greeting for ever
    try:
        comm = await asyncio.wait_for(call, PATIENCE)
    except (MemoryError, TimeoutError) as error:  # another program may answer with anything
        raise OSError(f"no greeting of a scheduler within {PATIENCE} s") from error
    await comm.close()


@functools.cache  # a worker keeps the code that it loaded, whatever is edited afterwards
def about() -> dict[str, str]:
    """Return what must be the same on all workers, for their results to be of one kind."""
    known = {"dtlib": CODE, "Python": platform.python_version(), **versions()}
    return known | {"device": choose_device()}


def _look(token: str) -> dict:
    """Return what this worker is: its versions, its processor, whether it has the cache's lock."""
    found = {"about": about(), "card": os.environ.get("CUDA_VISIBLE_DEVICES"), "token": ""}
    path = cache_root() / token
    with contextlib.suppress(OSError):
        found["token"] = path.read_text(encoding="utf-8")
        try:
            with FileLock(f"{path}.lock").acquire(timeout=0):
                found["locks"] = False
        except Timeout:
            found["locks"] = True
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found["processor"] = next(line for line in lines if line.startswith("model name"))
    return found | {"host": socket.gethostname(), "cache": str(cache_root())}


def check_workers(client: Client) -> dict[str, str]:
    """Wait for a first worker; return what ``about`` must be on all of them.

    Raises UserError unless each has one thread, our cache, our versions and a card of its own. Says
    where processors differ (their last digits do, too), and where locks reach one machine only.
    """
    if not client.nthreads():
        print("Waiting for the first worker.", flush=True)
        client.wait_for_workers(1)
    for address, threads in client.nthreads().items():
        if threads > 1:
            advice = f"start it with --nthreads 1 --nworkers {threads}"
            raise UserError(f"Worker {address} has {threads} threads, a run needs one: {advice}.")
    path = temporary_name(cache_root())
    with locked(path):
        path.write_text(path.name, encoding="utf-8")
        try:
            found = client.run(_look, path.name)
        finally:
            path.unlink()
    first, cards = next(iter(found.values()))["about"], set()
    ours = about() | {"device": first["device"]}  # a node that only submits may have no card
    for address, seen in found.items():
        if seen["token"] != path.name:
            what = f"Worker {address} on {seen['host']} does not see the cache {cache_root()}"
            advice = "set DTLIB_CACHE there to this folder, on a shared disk"
            raise UserError(f"{what}; it has {seen['cache']}: {advice}.")
        check_same(seen["about"], ours, address)
        card = (seen["host"], seen["card"])
        if first["device"] == "cuda" and card in cards:
            what = f"Two workers on {seen['host']} use the same card"
            raise UserError(f"{what}: give each a CUDA_VISIBLE_DEVICES of its own, not {card[1]}.")
        cards.add(card)
    if not all(seen["locks"] for seen in found.values()):
        print("Locks of this cache stay on one machine: start no second command on it meanwhile.")
    if len({seen.get("processor") for seen in found.values()}) > 1:
        print("Workers have different processors: their results differ in the last digits.")
    return ours


def check_same(theirs: dict, ours: dict, worker: str) -> None:
    """Raise UserError where a worker has other versions, another ``dtlib`` or another device."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            what = f"Worker {worker} has {name} {theirs.get(name)}, expected {value}"
            raise UserError(f"{what}: install what is here, or results of both would be mixed.")


def run_all(job: Callable, items: list, description: str) -> list:
    """Return ``job(item, device, on_steps)`` of each item, in order, computed by workers.

    The bar says how many runs are at work and how many failed. A worker that dies or reaches its
    walltime loses its run to another one. All others end before an error is raised.
    """
    with _client(os.environ[ADDRESS]) as client:
        expected = check_workers(client)
        names = [run_folder(i).name if isinstance(i, RunConfig) else i.name for i in items]
        futures = [
            client.submit(_task, job, item, expected, name, key=f"{name}-{time.time_ns()}")
            for item, name in zip(items, names, strict=True)
        ]
        with tqdm(total=len(items), desc=description, unit="run") as bar:
            while bar.n < len(items):
                time.sleep(0.2)
                states = [future.status for future in futures]
                bar.update(len(items) - states.count("pending") - bar.n)
                if client.status == "running":
                    with contextlib.suppress(OSError):  # it has just died: the states say so soon
                        busy = sum(map(bool, client.processing().values()))
                        bar.set_postfix_str(f"{busy} running, {states.count('error')} failed")
        list(cache_root().glob("*/*"))  # a network disk may remember what was absent before
        return _results(dict(zip(names, futures, strict=True)))


def _results(ended: dict[str, object]) -> list:
    """Return the results of futures that have ended, by the names of their runs.

    Raises the first error, and UserError if the scheduler is gone.
    """
    if any(future.status in ("cancelled", "lost") for future in ended.values()):
        text = f"The scheduler at {os.environ[ADDRESS]} is gone: start it and its workers, then"
        raise UserError(f"{text} {AGAIN}.")
    failed = [name for name, future in ended.items() if future.status == "error"]
    if not failed:
        return [future.result() for future in ended.values()]
    name, error = failed[0], ended[failed[0]].exception()
    log = cache_root() / "logs" / f"{name}.log"
    print(f"{len(failed)} of {len(ended)} failed, first {name}: see {log}.", flush=True)
    if isinstance(error, KilledWorker):
        text = f"Each of several workers that got {name} died, perhaps for lack of memory"
        raise UserError(f"{text}: {AGAIN}.") from error
    raise error


def _task(job: Callable, item: object, expected: dict, name: str) -> object:
    """Run one job on a worker; write what happens into the cache's logs/NAME.log."""
    check_same(about(), expected, socket.gethostname())
    log = cache_root() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done, said = 0, time.monotonic()

        def say(text: str) -> None:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=file, flush=True)

        def on_steps(steps: int) -> None:
            nonlocal done, said
            done += steps
            if time.monotonic() - said > 10:
                say(f"{done} steps")
                said = time.monotonic()

        say(f"begins on {socket.gethostname()}, process {os.getpid()}")
        try:
            with contextlib.redirect_stdout(file):
                result = job(item, expected["device"], on_steps)
        except BaseException:
            say(traceback.format_exc())
            raise
        say(f"is done, {done} steps")
        return result
