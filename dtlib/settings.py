"""Settings "name=value" from the command line, read and checked against examples."""

import ast
import inspect
from collections.abc import Iterable

from pydantic import TypeAdapter, ValidationError

from dtlib.errors import UserError

WORDS = {"true": True, "false": False, "none": None}


def parse_settings(items: Iterable[str], examples: dict | None = None) -> dict[str, object]:
    """Read texts "name=value" into values by name. ``examples`` has values of the right types.

    A value is a Python literal, true, false, none, or else text. Lists need no brackets, no quotes.
    Where the example is text the value stays text; where it is a list, one item makes a list.
    """
    pairs = (item.partition("=")[::2] for item in items)
    return {name: _read(text, (examples or {}).get(name)) for name, text in pairs}


def _read(text: str, example: object = None) -> object:
    if isinstance(example, str):
        return text
    try:
        value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        items = [item.strip() for item in text.strip("[]() ").split(",") if item.strip()]
        value = [_read(item) for item in items] if "," in text or text.startswith("[") else text
    if isinstance(example, list) and text and not isinstance(value, list | tuple):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def fit(name: str, value: object, example: object) -> object:
    """Return ``value`` if it has the type of ``example`` (None: any). Raises UserError."""
    if example is None:
        return value
    kind, value = _type(example), list(value) if isinstance(value, tuple) else value
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        kind = inspect.formatannotation(kind)
        text = f"Parameter {name} got {value!r}: expected {kind}, such as {example!r}."
        raise UserError(text) from error


def _type(example: object) -> type:
    """The type of ``example``, with that of its items: list[int]."""
    kind = type(example)
    items = example.values() if kind is dict else example if kind is list else []
    inner = {_type(item) for item in items}
    if len(inner) != 1:
        return kind
    return list[inner.pop()] if kind is list else dict[str, inner.pop()]
