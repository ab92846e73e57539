"""The tokens that a model's own files declare to end its answers."""

from pathlib import Path

from spt_jax.bases.files import CONFIG_BYTES, read_json
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import CheckpointError


def declared_ends(directory: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's EOS and `eos_token_id` of generation_config.json and config.json.

    Each of these files may name one id or several, and models differ in which of them is complete: Gemma's tokenizer
    has `<eos>`, and only its generation config adds `<end_of_turn>`.

    Args:
      directory: of the model.
      tokenizer: the model's.
      vocab_size: ids that the model does not have are left out.

    Returns:
      The ids, sorted, each once.

    Raises:
      CheckpointError: a file is not JSON, or its `eos_token_id` is neither an integer nor a list of integers.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.is_file():
            found |= set(_ids(file))
    return tuple(sorted(id_ for id_ in found if id_ is not None and 0 <= id_ < vocab_size))


def _ids(file: Path) -> list[int]:
    declared = read_json(file, CONFIG_BYTES).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if any(type(id_) is not int for id_ in ids):
        raise CheckpointError(f"{file}: eos_token_id is {declared!r}; it must be an integer or a list of integers")
    return ids
