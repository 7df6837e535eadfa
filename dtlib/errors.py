"""The one exception that users see."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from pydantic import ValidationError, model_validator
from pydantic.dataclasses import dataclass


class UserError(Exception):
    """Something the user can put right; one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        """Return one line, whatever was quoted."""
        return " ".join(super().__str__().split())

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


def problem(error: ValidationError) -> str:
    """Return the first thing that pydantic found wrong: "name=value: reason"."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}={first['input']!r:.200}: {first['msg']}"


@contextlib.contextmanager
def explained(what: str, advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of ``kinds`` into the UserError "``what`` (error): ``advice``.".

    Exception stands for all kinds but UserError and MemoryError.
    """
    try:
        yield
    except kinds as error:
        if Exception in kinds and isinstance(error, UserError | MemoryError):
            raise
        raise UserError(f"{what} ({type(error).__name__}: {error}): {advice}.") from error


@dataclass(frozen=True)
class Checked:
    """Values of a config. Raises UserError for a wrong name, type or value."""

    def own_values(self) -> dict[str, object]:
        """Return what None and "" stand for. Raises UserError where values do not fit together."""
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
