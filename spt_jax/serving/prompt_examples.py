"""Example inputs of a prompt, which its directory may have for the page at /."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spt_jax.errors import ConfigError

EXAMPLES_FILE = "examples.json"
MOST, LONGEST = 12, 2000


def read_examples(folder: Path) -> list[str | dict[str, str]]:
    """Reads `examples.json` of a prompt directory: a list of texts, or of mappings from fields to texts.

    Returns:
      At most 12 texts or records; an empty list without the file.

    Raises:
      ConfigError: the file is not such a list, or a text has more than 2,000 characters.
    """
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        return []
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{EXAMPLES_FILE} is not JSON ({error})") from error
    if not isinstance(given, list):
        raise ConfigError(f"{EXAMPLES_FILE} is not a list of texts or records")
    for number, own in enumerate(given, 1):
        texts = [own] if isinstance(own, str) else [*own, *own.values()] if isinstance(own, dict) else [None]
        if not all(isinstance(text, str) and len(text) <= LONGEST and _is_encodable(text) for text in texts):
            raise ConfigError(
                f"{EXAMPLES_FILE}, example {number}: neither a text nor a mapping from fields to texts, each of at most"
                f" {LONGEST} characters"
            )
    return given[:MOST]


def examples_for(examples: Sequence[str | Mapping[str, str]], fields: Sequence[str]) -> list[dict[str, str]]:
    """Returns the examples as records of a template with these fields, of which a text is the only one.

    Examples with other fields are left out.
    """
    records = [{fields[0]: own} if isinstance(own, str) and len(fields) == 1 else own for own in examples]
    return [dict(own) for own in records if not isinstance(own, str) and set(own) == set(fields)]


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
