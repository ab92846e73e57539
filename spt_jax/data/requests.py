"""Requests that are no records yet: texts, or values of fields given by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import ConfigError, did_you_mean


def text_records(template: Template, texts: Sequence[str | Sequence[int]]) -> list[dict[str, Any]]:
    """Returns a record for each text: the template's only field or, for a chat, the user's turn.

    Args:
      template: the template that reads the records.
      texts: the texts; for a template with one field, their token ids are possible as well.

    Raises:
      ConfigError: the template does not have exactly one field.
    """
    if template.is_conversation:
        return [{MESSAGES: [{"role": "user", "content": text}]} for text in texts]
    names = template.prompt_fields
    if len(names) != 1:
        raise ConfigError(f"the template has the fields {', '.join(names) or 'none'}; give them by name, as fields")
    return [{names[0]: text} for text in texts]


def field_record(template: Template, fields: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record with these fields. A field that is missing is an error when the record is encoded.

    Raises:
      ConfigError: the template has no field of that name.
    """
    for name in fields:
        if name not in template.prompt_fields:
            hint = did_you_mean(name, template.prompt_fields)
            raise ConfigError(f"the template has no field {name!r}; {hint}")
    return dict(fields)
