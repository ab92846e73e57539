"""Field values as text. Values that are neither text nor numbers are refused, never converted silently."""

import decimal
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from spt_jax.errors import DataError, did_you_mean


def text_of(value: object, what: str) -> str:
    """Returns a value as text: a string as it is, a number or boolean as in JSON, or the text parts of a chat joined.

    Args:
      value: a value of a record. Text parts are a list of {"type": "text", "text": ...}.
      what: the name of the value in error messages.

    Raises:
      DataError: the value is null or NaN, or a list, a mapping or anything else that is not text.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        raise DataError(f"{what} is {'null' if value is None else 'NaN'}; fill it in or remove the record")
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value):
        return str(value)
    if is_list(value) and value and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise DataError(f"{what} is {_described(value)}; it must be text or a number")


def field_of(record: Mapping[str, object], name: str, index: int) -> object:
    """Returns the value of a record's field, of any type.

    Args:
      record: the record.
      name: the name of the field.
      index: the record's number from 0, for error messages.

    Raises:
      DataError: the record has no such field, or the field is null.
    """
    if name not in record:
        raise DataError(f"record {index + 1}: no field {name!r}; {did_you_mean(name, record)}")
    if record[name] is None:
        raise DataError(f"record {index + 1}: the field {name!r} is null; fill it in or remove the record")
    return record[name]


def field_text(record: Mapping[str, object], name: str, index: int) -> str:
    """Returns a record's field as text. Takes the arguments of `field_of`.

    Raises:
      DataError: see `field_of` and `text_of`.
    """
    return text_of(field_of(record, name, index), f"record {index + 1}: the field {name!r}")


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence other than text."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return False
    return all(value is None for name, value in part.items() if name not in ("type", "text"))


def _described(value: object) -> str:
    kind = "a list" if is_list(value) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
    return f"{kind} ({str(value)[:60]})"
