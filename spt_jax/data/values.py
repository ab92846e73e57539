"""Values of a record's fields as text. A value that is not text is never turned into a string in silence."""

import decimal
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from spt_jax.errors import DataError, did_you_mean


def text_of(value: object, what: str) -> str:
    """A value as text: itself, a number or boolean as JSON writes it, or text parts joined.

    Args:
      value: from a record. Text parts are a list of {"type": "text", "text": ...}, as chats have them.
      what: names the value in errors.

    Raises:
      DataError: there is no value (null or NaN), or it is a list, a mapping or anything else that is not text.
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
        raise DataError(f"{what} is {'null' if value is None else 'NaN'}; fill it in or leave the record out")
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value):
        return str(value)
    if is_list(value) and value and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise DataError(f"{what} is {_described(value)}, and text or a number is needed")


def field_of(record: Mapping[str, object], name: str, index: int) -> object:
    """A record's field, whatever it holds.

    Args:
      record: the record.
      name: of the field.
      index: the record's number from 0, for errors.

    Raises:
      DataError: there is no such field, or it is null.
    """
    if name not in record:
        raise DataError(f"record {index + 1}: no field {name!r}; {did_you_mean(name, record)}")
    if record[name] is None:
        raise DataError(f"record {index + 1}: the field {name!r} is null; fill it in or leave the record out")
    return record[name]


def field_text(record: Mapping[str, object], name: str, index: int) -> str:
    """A record's field as text. Args are those of `field_of`.

    Raises:
      DataError: as `field_of` and `text_of`.
    """
    return text_of(field_of(record, name, index), f"record {index + 1}: the field {name!r}")


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, and not text."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return False
    return all(value is None for name, value in part.items() if name not in ("type", "text"))


def _described(value: object) -> str:
    kind = "a list" if is_list(value) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
    return f"{kind} ({str(value)[:60]})"
