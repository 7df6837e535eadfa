"""Runs on Dask's workers: what is checked before, what fails, and what is said of it."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

cluster = pytest.importorskip("dtlib.cluster", exc_type=Exception)

from distributed import LocalCluster  # noqa: E402

from dtlib import parallel, records, runs  # noqa: E402
from dtlib.config import RunConfig  # noqa: E402
from dtlib.errors import UserError  # noqa: E402
from dtlib.storage import cache_root  # noqa: E402

QUIET = {"dashboard_address": ":0", "silence_logs": 50}


@pytest.fixture(scope="module")
def workers():
    """A real scheduler with one worker, in threads of this process."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET) as found:
        yield found.scheduler_address


@pytest.fixture
def address(workers, monkeypatch):
    monkeypatch.setenv(cluster.ADDRESS, workers)
    return workers


def items(*names):
    return [SimpleNamespace(name=name) for name in names]


def named(item, device, on_steps):
    on_steps(3)
    print("says", item.name)
    if "wrong" in item.name:
        raise UserError(f"{item.name} is no good")
    return item.name, device


def long(item, device, on_steps):
    time.sleep(3)


def test_results_come_in_order_and_each_run_has_a_log(address):
    found = parallel.run_all(named, items("b", "a"), total=0, description="")
    assert found == [("b", "cpu"), ("a", "cpu")]
    lines = (cache_root() / "logs" / "a.log").read_text().splitlines()
    assert f"process {os.getpid()}" in lines[0] and lines[1] == "says a" and "3 steps" in lines[2]


def test_a_run_that_fails_does_not_stop_the_others(address, capsys):
    with pytest.raises(UserError, match="wrong is no good"):
        cluster.run_all(named, items("wrong", "right"), "")
    assert "1 of 2 failed, first wrong: see" in capsys.readouterr().out
    assert "right.log" in os.listdir(cache_root() / "logs")
    assert "UserError" in (cache_root() / "logs" / "wrong.log").read_text()


def test_a_run_trained_there_is_the_run_trained_here(address, hopper_file):
    wish = {"dataset": str(hopper_file), "size": "tiny", "context": 2, "initialisation": "random"}
    wish |= {"epochs": 1, "steps_per_epoch": 2, "batch_size": 2, "evaluation_episodes": 1}
    (there,) = runs.fine_tuned([RunConfig(**wish)])
    assert (cache_root() / "logs" / f"{there.path.name}.log").exists()
    there.path.rename(there.path.with_name("moved"))
    os.environ.pop(cluster.ADDRESS)
    (here,) = runs.fine_tuned([RunConfig(**wish)])
    assert here.metrics == there.metrics
    assert here.record["checkpoints"] == there.record["checkpoints"]


def test_a_scheduler_that_goes_is_said(monkeypatch):
    monkeypatch.setitem(cluster.dask.config.config["distributed"]["comm"]["timeouts"], "connect", 1)
    own = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET)
    monkeypatch.setenv(cluster.ADDRESS, own.scheduler_address)
    threading.Timer(1, lambda: own.loop.add_callback(own.scheduler.close)).start()
    with pytest.raises(UserError, match="is gone: start it .* give the same command again"):
        cluster.run_all(long, items("a"), "")
    with contextlib.suppress(TimeoutError):
        own.close(timeout=1)


def test_no_scheduler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answers = b"220 mail " * 9, bytes(4096), b""  # the last one stays silent
        held = []

        def answer():
            for text in answers:
                held.append(other.accept()[0])
                held[-1].sendall(text)

        threading.Thread(target=answer, daemon=True).start()
        ours, odd = f"tcp://127.0.0.1:{port}", ("nonsense:", "far", "ftp://a:1", "tls://a:1")
        for text in ("tcp://127.0.0.1:9", ours, ours, ours, *odd):
            with pytest.raises(UserError, match="No Dask scheduler answers at"):
                cluster.connected(text).__enter__()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="expected JSON with jobs and arguments of SLURMCluster"):
        cluster.connected("", "{jobs: 3}").__enter__()
    assert signal.getsignal(signal.SIGINT) is before  # dask_jobqueue would exit without a word


def test_workers_that_fit_are_taken(workers):
    async def in_a_notebook():  # whose thread runs a loop
        with cluster.connected(workers):
            assert os.environ[cluster.ADDRESS] == workers

    asyncio.run(in_a_notebook())
    assert cluster.ADDRESS not in os.environ


def client(threads=1, **seen):
    """What a worker would answer."""
    usual = {"about": cluster.about(), "host": "far", "card": None, "cache": "/there"}

    def run(look, token):
        return {"w1": usual | {"token": token, "locks": True, "processor": "one"} | seen}

    return SimpleNamespace(nthreads=lambda: {"w1": threads}, run=run)


def test_a_worker_that_does_not_fit_is_refused_before_hours_begin():
    cluster.check_workers(client())
    with pytest.raises(UserError, match="has 4 threads.*--nthreads 1 --nworkers 4"):
        cluster.check_workers(client(threads=4))
    with pytest.raises(UserError, match="w1 on far does not see the cache .*; it has /there"):
        cluster.check_workers(client(token=""))
    with pytest.raises(UserError, match="w1 has torch 1.0, expected .*would be mixed"):
        cluster.check_workers(client(about=cluster.about() | {"torch": "1.0"}))
    with pytest.raises(UserError, match="w1 has dtlib other, expected"):
        cluster.check_workers(client(about=cluster.about() | {"dtlib": "other"}))


def test_two_workers_on_one_card_are_refused():
    twice = client(about=cluster.about() | {"device": "cuda"}, card="0")
    one = twice.run
    twice.run = lambda *given: one(*given) | {"w2": one(*given)["w1"]}
    with pytest.raises(UserError, match="Two workers on far use the same card"):
        cluster.check_workers(twice)


def test_locks_that_stay_on_one_machine_and_other_processors_are_said(capsys):
    several = client(locks=False)
    one = several.run
    several.run = lambda *given: one(*given) | {"w2": one(*given)["w1"] | {"processor": "other"}}
    cluster.check_workers(several)
    printed = capsys.readouterr().out
    assert "Locks of this cache stay on one machine" in printed
    assert "different processors" in printed


def test_a_worker_that_comes_later_with_other_versions_computes_nothing():
    expected = cluster.about() | {"mujoco": "0"}
    with pytest.raises(UserError, match="mujoco .*, expected 0"):
        cluster._task(named, SimpleNamespace(name="later"), expected, "later")
    assert not (cache_root() / "logs" / "later.log").exists()


def test_unfinished_runs_are_listed():
    folder = records.runs_root() / ".partial" / "hopper-some-run"
    folder.mkdir(parents=True)
    assert records.unfinished() == ["hopper-some-run   interrupted, saved at step 0"]
    with cluster.locked(folder):
        assert "running" in records.unfinished()[0]
    folder.rmdir()
    assert records.unfinished() == []
