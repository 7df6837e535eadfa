"""The smoke profile through a real Slurm on this machine, with a killed and a cancelled job.

Run from the repository's root, as root: .venv/bin/python tests/slurm/run.py. Needs Debian's
slurmctld, slurmd, slurm-client and munge. Ends with 0 if every table is the same to the byte as
without Slurm. Everything it starts ends with it; nothing is written outside a temporary folder, but
for munge's own files.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOTEBOOKS = ["00", "05"]
COMMAND = [sys.executable, "-m", "dtlib", "figures", *NOTEBOOKS, "--profile", "smoke"]
OPTIONS = '{"jobs": 2, "cores": 1, "memory": "4GB", "walltime": "00:30:00"}'
CONFIGURATION = """ClusterName=one
SlurmctldHost={host}
AuthType=auth/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
NodeName={host} CPUs={cores} RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path):
    """A Slurm of one node, described in ``folder``; commands find it by SLURM_CONF."""
    text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = Path("/run/munge/munge.socket.2").exists()
    commands = [["slurmctld", "-D"], ["slurmd", "-D"]]
    if not munge:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged"])
    started = []
    for command in commands:
        with open(folder / f"{command[0]}.log", "w", encoding="utf-8") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        wait(lambda: "idle" in output("sinfo", "-h", "-o", "%T"), "the node is idle", 60)
        yield
    finally:
        output("scancel", "--user", "root")
        time.sleep(2)
        for process in reversed(started):
            process.terminate()
            process.wait()
        if not munge:
            output("pkill", "munged")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait(true, what: str, seconds: float):
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise SystemExit(f"Waited {seconds} s in vain until {what}.")
        time.sleep(0.05)


def run_at_work(cache: Path, but: str = "") -> tuple[str, int]:
    """Wait for a run that has saved an epoch and is not done; return its name and its process."""
    found = []

    def look() -> bool:
        for state in (cache / "runs/.partial").glob("*/resume.safetensors"):
            with contextlib.suppress(OSError, IndexError):
                log = (cache / f"logs/{state.parent.name}.log").read_text()
                if "is done" not in log and state.parent.name != but:
                    found.append((state.parent.name, int(re.findall("process (.*)", log)[-1])))
        return bool(found)

    wait(look, "a run is at work", 300)
    return found[0]


def job_of(process: int) -> str:
    about = Path(f"/proc/{process}/environ").read_text()
    return re.search("SLURM_JOB_ID=([0-9]+)", about)[1]


def main() -> int:
    if not shutil.which("slurmctld") or not shutil.which("slurmd"):
        print("Slurm is not installed: skipped.")
        return 0
    with tempfile.TemporaryDirectory() as name, slurm(folder := Path(name)):
        os.chdir(Path(__file__).parents[2])
        local = os.environ | {"DTLIB_CACHE": f"{name}/local"}
        began = time.time()
        subprocess.run([*COMMAND, "--figures", f"{name}/here"], env=local, check=True)
        print(f"\nWithout Slurm: {time.time() - began:.0f} s", flush=True)
        shutil.copytree(folder / "local/data", folder / "shared/data")
        began, there = time.time(), os.environ | {"DTLIB_CACHE": f"{name}/shared"}
        command = [*COMMAND, "--figures", f"{name}/there", "--slurm", OPTIONS]
        batch = subprocess.Popen(command, env=there, cwd=os.getcwd())
        try:
            killed, process = run_at_work(folder / "shared")
            job = job_of(process)
            os.kill(process, signal.SIGKILL)
            print(f"\nKilled the worker of job {job} in {killed}", flush=True)
            cancelled, process = run_at_work(folder / "shared", but=killed)
            job = job_of(process)
            output("scancel", job)  # as when its walltime ends
            print(f"\nCancelled job {job} in {cancelled}", flush=True)
            print(output("squeue"), flush=True)
        finally:
            status = batch.wait()
        print(f"\nWith Slurm: status {status}, {time.time() - began:.0f} s")
        for run in (killed, cancelled):
            print((folder / f"shared/logs/{run}.log").read_text())
        tables = sorted((folder / "here").rglob("*.csv"))
        other = [t for t in tables if t.read_bytes() != there_of(t, folder).read_bytes()]
        print(
            f"{len(tables) - len(other)} of {len(tables)} tables are the same to the byte {other}"
        )
        return int(bool(status or other or not tables))


def there_of(table: Path, folder: Path) -> Path:
    return folder / "there" / table.relative_to(folder / "here")


if __name__ == "__main__":
    sys.exit(main())
