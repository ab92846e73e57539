"""The pooling of an encoder, in the files of the library Sentence Transformers."""

from pathlib import Path
from typing import Literal

from spt_jax.bases.files import CONFIG_BYTES, read_json
from spt_jax.errors import ConfigError

POOLING_FILE = "1_Pooling/config.json"
_FIELDS: dict[str, Literal["first", "mean", "last"]] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def stored_pooling(directory: Path) -> Literal["first", "mean", "last"] | None:
    """Returns the pooling that a model directory names; None if it names none.

    Args:
      directory: holds the model's files.

    Raises:
      CheckpointError: the file is damaged.
      ConfigError: it names several kinds of pooling, or one that is not supported.
    """
    file = directory / POOLING_FILE
    if not file.is_file():
        return None
    content = read_json(file, CONFIG_BYTES)
    named = [name for name, value in content.items() if name.startswith("pooling_mode_") and value is True]
    if len(named) != 1 or named[0] not in _FIELDS:
        raise ConfigError(f"{file}: the pooling is {named or 'not set'}; supported is one of {', '.join(_FIELDS)}")
    return _FIELDS[named[0]]
