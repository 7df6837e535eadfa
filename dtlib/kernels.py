"""Jupyter kernels forked from one process that has already imported what the notebooks import, so that each starts at once."""

import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from unittest.mock import patch

import torch
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from dtlib.workers import end_with_parent

NAME = "dtlib-forked"
# Imported once, not in each kernel; a kernel shares nothing else with the one before it.
PRELOADED = ["ipykernel.kernelapp", "ipywidgets", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf",
             "matplotlib.pyplot", "pandas", "scipy.stats", "tokenizers", "torch._dynamo", "dtlib.collect",
             "dtlib.language_losses", "dtlib.plots", "dtlib.pretrain", "dtlib.probe", "dtlib.runs", "dtlib.verdicts"]


def preload() -> dict:
    """Begin to import, in the background, in the process that kernels will be forked from, where it is known to be safe.

    Returns the metadata of a kernel spec that asks for such kernels; empty where forks are not safe: outside Linux, and with
    a CUDA card, whose driver does not survive them.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return {}
    group = KernelProvisionerFactory.GROUP_NAME
    KernelProvisionerFactory.instance().provisioners[NAME] = EntryPoint(NAME, f"{__name__}:{ForkedKernel.__name__}", group)
    with patch.dict(os.environ, MPLBACKEND="module://matplotlib_inline.backend_inline"):  # read by matplotlib's import
        multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    return {"kernel_provisioner": {"provisioner_name": NAME}}


class _Process(multiprocessing.context.ForkServerProcess):
    """A kernel's process, with what Jupyter asks of a ``subprocess.Popen``."""
    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def run(self) -> None:
        command, environment, folder = self._args
        os.setsid()  # Jupyter signals a kernel and its children as a group
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        end_with_parent()
        from ipykernel.kernelapp import IPKernelApp
        arguments = command[command.index("-m") + 2:]  # of python -m ipykernel_launcher
        IPKernelApp.launch_instance(arguments, parent_handle=os.getppid())  # so that it knows that it has one


class ForkedKernel(LocalProvisioner):
    """Starts a Python kernel as a fork of the process that ``preload`` began."""

    async def launch_kernel(self, cmd: list[str], **kwargs: object) -> dict:
        self.process = _Process(args=(cmd, kwargs["env"], kwargs.get("cwd") or os.getcwd()))
        with patch.dict(sys.modules, __main__=ModuleType("__main__")):  # else it would run the caller's script again
            self.process.start()
        self.pid = self.pgid = self.process.pid
        return self.connection_info
