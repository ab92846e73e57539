"""Shortens the field that a template permits to truncate."""

from collections.abc import Callable, Mapping
from typing import Any

from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import DataError


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


def shortened(
    template: Template,
    record: Mapping[str, Any],
    index: int,
    encode: Callable[[Mapping[str, Any], int], Example],
    max_length: int,
) -> Example:
    """Returns the example of a record that is too long, with its `truncate` field shortened.

    Args:
      template: the template.
      record: the record.
      index: its number from 0.
      encode: encodes a record of this number.
      max_length: the maximum number of tokens of an example.

    Raises:
      DataError: the template has no `truncate` field, or the example is too long without it.
    """
    field = template.truncate
    if field is None:
        raise DataError(
            f"record {index + 1}: {encode(record, index).length} tokens, at most {max_length} fit; name a field that"
            " may be shortened (data.truncate), or raise data.max_length"
        )
    example = encode(shorten(template, record, index, lambda part: encode(part, index).length <= max_length), index)
    if example.length > max_length:
        raise DataError(
            f"record {index + 1}: {example.length} tokens even without its field {field!r}; at most {max_length} fit"
        )
    return example
