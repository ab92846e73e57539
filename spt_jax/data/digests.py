"""What results that are kept on disk depend on: the content of records, and whose code encodes them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.task import task_of
from spt_jax.data.templates import Template


def records_digest(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the SHA-256 of records in order; None if one holds something else than JSON values.

    Args:
      records: the records.
    """
    sha = hashlib.sha256()
    encode = json.JSONEncoder(check_circular=False).encode
    try:
        for record in records:
            sha.update(encode(dict(record)).encode())
            sha.update(b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return sha.hexdigest()


def is_ours(template: Template) -> bool:
    """Returns whether the task of a template is one of this package, whose code is known.

    Args:
      template: the template.
    """
    return type(task_of(template)).__module__.startswith("spt_jax.")
