"""The exceptions that users see, and the checks of values that raise them."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator

from pydantic import ValidationError, model_validator
from pydantic.dataclasses import dataclass

BUSY = errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM


class UserError(Exception):
    """Something the user can put right; one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        """Return one line, whatever was quoted."""
        return " ".join(super().__str__().split())

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


class Unreadable(UserError):
    """Something that the system does not let us read now; it may be whole."""


@contextlib.contextmanager
def refused(
    codes: tuple[int, ...], what: str, advice: str, kind: type[UserError] = UserError
) -> Iterator[None]:
    """Turn what the system refuses, with one of errno's ``codes``, into a ``kind`` of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Safetensors wraps the system's error, whose text is still there.
        if not any(os.strerror(code) in str(error) for code in codes):
            raise
        raise kind(f"{what} ({error}): {advice}.") from error


def reading() -> contextlib.AbstractContextManager:
    """Turn what the system refuses to read just now, not for damage, into ``Unreadable``."""
    advice = "see who may read it and whether its disk answers, then run again"
    return refused(BUSY, "This cannot be read now", advice, Unreadable)


def problem(error: ValidationError) -> str:
    """Return the first thing that pydantic found wrong: "name=value: reason"."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}={first['input']!r:.200}: {first['msg']}"


@contextlib.contextmanager
def explained(what: str, advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of ``kinds`` into the UserError "``what`` (error): ``advice``.".

    Exception stands for all kinds but UserError and MemoryError; Unreadable stays as it is.
    """
    try:
        yield
    except kinds as error:
        whole = Exception in kinds and isinstance(error, UserError | MemoryError)
        if whole or isinstance(error, Unreadable):
            raise
        raise UserError(f"{what} ({type(error).__name__}: {error}): {advice}.") from error


@dataclass(frozen=True)
class Checked:
    """Values of a config. Raises UserError for a wrong name, type or value."""

    def own_values(self) -> dict[str, object]:
        """Return what None and "" stand for; ``_check`` puts it in their place.

        Raises UserError where values do not fit together.
        """
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: object, build: Callable) -> "Checked":
        try:
            config = build(values)
        except ValidationError as error:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise UserError(f"Parameter {problem(error)}. Known are {known}.") from error
        for name, value in config.own_values().items():
            if getattr(config, name) in (None, ""):
                object.__setattr__(config, name, value)
        return config
