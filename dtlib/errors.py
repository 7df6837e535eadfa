"""The one exception that users see, the one way to write a file that is either whole or absent, locks, and the cache."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from pydantic import ValidationError


class UserError(Exception):
    """Something the user can put right: one sentence says what was wrong, what was expected and what to do."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of a traceback
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


@contextlib.contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Turn a full disk, or a file over the user's size limit, met while writing ``path`` into a ``UserError``."""
    try:
        yield
    except Exception as error:
        # By its text, which still carries the system's error where safetensors wraps it.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)):
            raise UserError(f"No room to write {path}: the disk is full or a size limit was reached ({error}); "
                            "free some space, or point DTLIB_CACHE to a larger disk, and run again.") from error
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    ``path`` is the old file or the whole new one, even after ``kill -9``, which may leave a ``.writing-*`` file beside it.
    Raises ``UserError`` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with no_room(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str | dict) -> None:
    """Write text, or a dictionary as JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path``'s lock against other processes and leave no lock file (filelock retries when one vanishes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is making {path.name}: waiting for it.", flush=True)
        held = lock.acquire()
    with held:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(cls: type, values: object, build: Callable) -> object:
    """``build(values)``, a pydantic dataclass; a wrong name, type or value is a ``UserError`` that names the known ones."""
    try:
        return build(values)
    except ValidationError as error:
        first, known = error.errors()[0], ", ".join(field.name for field in dataclasses.fields(cls))
        raise UserError(f"Parameter {first['loc'][0]}={first['input']!r}: {first['msg']}. Known are {known}.") from error


def versions() -> dict[str, str]:
    """What to state beside every number: the versions of the libraries that it depends on."""
    return {name: version(name) for name in ("torch", "transformers", "gymnasium", "mujoco", "numpy")}


def cache_root() -> Path:
    """Folder for collected data and fine-tuning runs: ``DTLIB_CACHE`` if set, else the user's cache folder."""
    return Path(os.environ.get("DTLIB_CACHE") or platformdirs.user_cache_dir("dtlib"))
