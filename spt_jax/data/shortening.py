"""Shortens the field of a record that may be truncated."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from spt_jax.data.values import field_text


def shortened(
    record: Mapping[str, Any],
    index: int,
    field: str,
    keep: Literal["start", "end"],
    fits: Callable[[Mapping[str, Any]], bool],
) -> Mapping[str, Any]:
    """Returns the record with the longest text in a field that fits; with an empty field if none fits.

    Args:
      record: the record.
      index: its number from 0, for messages.
      field: the field.
      keep: which end of the field is kept.
      fits: whether a record fits. A record with a shorter field fits if one with a longer field does.

    Raises:
      DataError: the field is missing or not text.
    """
    value = field_text(record, field, index)

    def kept(characters: int) -> Mapping[str, Any]:
        text = value[:characters] if keep == "start" else value[len(value) - characters :]
        return {**record, field: text}

    low, high = 0, len(value)  # by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(kept(middle)) else (low, middle - 1)
    return kept(low)
