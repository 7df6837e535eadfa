"""Settings "name=value" from the command line, read and checked against examples."""

import ast
import inspect
import os
from collections.abc import Iterable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dtlib.errors import UserError
from dtlib.storage import typed

WORDS = {"true": True, "false": False, "none": None}


def parse_settings(items: Iterable[str], examples: dict | None = None) -> dict[str, object]:
    """Read texts "name=value" into values by name. ``examples`` has values of the right types.

    A value is a Python literal, true, false, none, or else text. Lists need no brackets, no quotes.
    Where the example is text the value stays text; where it is a list, one item makes a list. The
    path of a file or folder that exists becomes absolute: it means the same in every process.
    Raises UserError for a name given twice.
    """
    found = {}
    for name, _, text in (item.partition("=") for item in items):
        if name in found:
            raise UserError(f"Parameter {name} is given twice: leave one out.")
        found[name] = _read(text, (examples or {}).get(name))
    return found


def _text(text: str) -> str:
    looks = text[:1] in ("~", ".") or os.sep in text or text.lower().endswith((".hdf5", ".h5"))
    return str(typed(text)) if looks and os.path.exists(typed(text)) else text


def _read(text: str, example: object = None) -> object:
    if isinstance(example, str):
        return _text(text)
    try:
        value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        items = [item.strip() for item in text.strip("[]() ").split(",") if item.strip()]
        plain = "," not in text and not text.startswith("[")
        value = _text(text) if plain else [_read(item) for item in items]
    if isinstance(example, list | tuple) and text and not isinstance(value, list | tuple):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def fit(name: str, value: object, example: object) -> object:
    """Return ``value`` if it has the type of ``example`` (None: any). Raises UserError."""
    if example is None:
        return value
    kind, value = _type(example), list(value) if isinstance(value, tuple) else value
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        found = adapter.validate_python(value, strict=True)
    except ValidationError as error:
        expected = f"{inspect.formatannotation(kind)}, such as {example!r}"
        raise UserError(f"Parameter {name} got {value!r}: expected {expected}.") from error
    for item in found if isinstance(found, list) else []:  # seeds, names: one would count as two
        if isinstance(item, int | str) and found.count(item) > 1:
            raise UserError(f"Parameter {name} got {item!r} more than once: leave the others out.")
    return found


def _type(example: object) -> type:
    """The type of ``example``, with that of its items: list[int]."""
    kind = type(example)
    items = example.values() if kind is dict else example if kind is list else []
    inner = {_type(item) for item in items}
    if len(inner) != 1:
        return kind
    return list[inner.pop()] if kind is list else dict[str, inner.pop()]
