"""How long twelve runs take by local processes and by Dask's workers; how time grows with both.

Run from the repository's root, on an idle machine: .venv/bin/python benchmarks/workers.py. Writes
workers.csv. A temporary cache is used. Every worker is started before the clock is.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from distributed import Client

from dtlib import cluster, config, data, runs
from dtlib.tasks import get_task

RUN = {"dataset": "collected:medium", "dataset_steps": 5000, "size": "mini", "context": 1}
RUN |= {"initialisation": "random", "batch_size": 64, "epochs": 1, "evaluation_episodes": 2}


def seconds_of(steps: int, seeds: list[int], processes: int | None) -> float:
    """Train a run of ``steps`` for each seed, at once; return the seconds."""
    configs = [config.RunConfig(**RUN, steps_per_epoch=steps, seed=seed) for seed in seeds]
    began = time.perf_counter()
    runs.fine_tuned(configs, processes=processes)
    return time.perf_counter() - began


def main() -> None:
    """Time local processes and workers in turn, each with runs of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DTLIB_CACHE"] = cache
        data.load("collected:medium", get_task("hopper"), steps=5000)
        steps = round(250 * 12 / seconds_of(250, [0], 1))  # a run of 12 seconds
        about, seeds = Path(cache, "scheduler.json"), iter(range(1, 10**6))
        dask = [sys.executable, "-m", "dask"]
        options = ["--scheduler-file", str(about), "--no-dashboard"]
        started = [subprocess.Popen([*dask, "scheduler", "--port", "0", *options])]
        try:
            for number in (1, 2, 4):
                more = number - len(started) + 1
                command = [*dask, "worker", "--nthreads", "1", "--no-nanny", *options]
                started += [subprocess.Popen(command) for _ in range(more)]
                while not about.exists():
                    time.sleep(0.1)
                with Client(scheduler_file=str(about), set_as_default=False) as client:
                    client.wait_for_workers(number)
                    client.run(cluster.about)  # imports what a run needs
                    address = client.scheduler.address
                for engine in ("local processes", "Dask"):
                    if engine == "Dask":
                        os.environ[cluster.ADDRESS] = address
                    chosen = [next(seeds) for _ in range(12 if number == 2 else 4)]
                    taken = seconds_of(steps, chosen, number)
                    os.environ.pop(cluster.ADDRESS, None)
                    row = {"engine": engine, "at once": number, "runs": len(chosen)}
                    rows.append(row | {"steps": steps, "seconds": taken, "cores": os.cpu_count()})
                    print(rows[-1], flush=True)
        finally:
            for process in started:
                process.kill()
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_name("workers.csv"), index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
