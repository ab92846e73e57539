"""Solved examples that precede a prompt."""

from collections.abc import Mapping
from typing import Any

from spt_jax.data.templates import Field, Piece, Plain, Template, parse
from spt_jax.data.values import field_text
from spt_jax.errors import DataError, did_you_mean

# Follows each solved example of a few-shot prompt, and so also ends a generated answer.
SEPARATOR = "\n\n"


def solved(template: Template, record: Mapping[str, Any], side: str) -> list[Piece]:
    """Returns the prompt or the target of a solved example, with its class as a verbalizer.

    Args:
      template: the template.
      record: the record.
      side: the template's prompt or target.

    Raises:
      DataError: a field is missing, or the label has no verbalizer.
    """
    known = dict(record)
    if template.verbalizers:
        name = template.label_field or ""
        label = field_text(record, name, 0)
        if label not in template.verbalizers:
            hint = did_you_mean(label, template.verbalizers)
            raise DataError(f"a solved example's label {label!r} has no verbalizer; {hint}")
        known[name] = template.verbalizers[label]
    return [Plain(field_text(known, p.name, 0)) if isinstance(p, Field) else p for p in parse(side)]
