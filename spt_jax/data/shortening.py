"""Shortens the field that a template permits to truncate."""

from collections.abc import Callable, Mapping
from typing import Any

from spt_jax.data.templates import Template
from spt_jax.data.values import field_text


def shorten(
    template: Template, record: Mapping[str, Any], index: int, fits: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any]:
    """Returns the record with the longest part of its `truncate` field that fits; with an empty field if none fits.

    Args:
      template: the template, which has a `truncate` field.
      record: the record.
      index: its number from 0, for messages.
      fits: whether a record with a shortened field fits; true for every shorter field if it is for a longer one.

    Raises:
      DataError: the field is missing or not text.
    """
    field = template.truncate or ""
    value = field_text(record, field, index)

    def kept(characters: int) -> Mapping[str, Any]:
        text = value[:characters] if template.keep == "start" else value[len(value) - characters :]
        return {**record, field: text}

    low, high = 0, len(value)  # by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(kept(middle)) else (low, middle - 1)
    return kept(low)
