"""The one exception that users see."""

import dataclasses
from collections.abc import Callable

from pydantic import ValidationError


class UserError(Exception):
    """Something the user can put right; one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        """Return one line, whatever was quoted."""
        return " ".join(super().__str__().split())

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


def checked(cls: type, values: object, build: Callable) -> object:
    """Return ``build(values)`` of a pydantic dataclass. Raises UserError for a wrong value."""
    try:
        return build(values)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        value = f"{first['loc'][0]}={first['input']!r:.200}"
        raise UserError(f"Parameter {value}: {first['msg']}. Known are {known}.") from error
