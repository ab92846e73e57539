"""Reads tokenizers of model directories. They are untrusted: sizes are bounded, and they are tried before use."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spt_jax.bases.files import CONFIG_BYTES, TOKENIZER_BYTES, listed, read_json
from spt_jax.errors import CheckpointError, DataError
from spt_jax.runtime.hf_library import import_transformers

# What patterns with nested repetitions take exponential time for: runs of one kind of character and a different end.
_PROBES = [character * 200 + "\u20ac" for character in "a1 .\n"]
_GROWTH = 256  # times that the rules of a normalizer may lengthen a text


if TYPE_CHECKING:

    class Tokenizer(Protocol):
        """What the library uses of a fast tokenizer of transformers."""

        @property
        def bos_token_id(self) -> int | None: ...

        @property
        def eos_token_id(self) -> int | None: ...

        @property
        def mask_token(self) -> Any: ...

        @property
        def mask_token_id(self) -> int | None: ...

        @property
        def chat_template(self) -> Any: ...

        @property
        def all_special_ids(self) -> list[int]: ...

        @property
        def all_special_tokens(self) -> list[str]: ...

        @property
        def added_tokens_decoder(self) -> Mapping[int, Any]: ...

        @property
        def special_tokens_map(self) -> Mapping[str, Any]: ...

        @property
        def backend_tokenizer(self) -> Any: ...

        def __len__(self) -> int: ...

        def __call__(
            self, text: str, text_pair: str | None = None, *, add_special_tokens: bool = True
        ) -> Mapping[str, Any]: ...

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

        def decode(
            self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
        ) -> str: ...

        def convert_ids_to_tokens(self, ids: Any) -> Any: ...

        def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

        def get_vocab(self) -> dict[str, int]: ...

        def get_chat_template(self) -> str: ...

        def save_pretrained(self, save_directory: Path) -> Any: ...

else:
    Tokenizer = object  # transformers finds attributes dynamically, so a check at run time would miss them


def read_tokenizer(directory: Path, hf: Any) -> Tokenizer:
    """Reads the fast tokenizer of a model directory. Reads local files only, never runs their code and never prompts.

    Args:
      directory: holds the tokenizer's files.
      hf: the transformers config of the model, which can decide the tokenizer's class.

    Raises:
      CheckpointError: it is missing, damaged or not a fast one, or cannot encode a short text.
    """
    transformers = import_transformers()
    hf.name_or_path, file = str(directory), directory / "tokenizer.json"
    if file.is_file():
        _check_growth(file, read_json(file, TOKENIZER_BYTES).get("normalizer"))
    if (directory / "tokenizer_config.json").is_file():
        read_json(directory / "tokenizer_config.json", CONFIG_BYTES)
    try:
        with tokenizer_panics():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, config=hf, trust_remote_code=False, local_files_only=True
            )
            if not tokenizer.encode("a"):  # transformers 5.0 makes an empty tokenizer where there are no files of one
                raise ValueError("it has no tokens")
            for text in _PROBES:
                tokenizer.backend_tokenizer.encode(text)
    except Exception as error:  # transformers and tokenizers raise anything for files that are wrong
        if not file.is_file():
            raise CheckpointError(_absent(directory)) from error
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {str(error)[:500]})"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{directory}: a fast tokenizer (tokenizer.json) is needed")
    return tokenizer


def _absent(directory: Path) -> str:
    others = sorted(
        entry.name for entry in directory.iterdir() if entry.name.startswith(("tokenizer", "spiece", "vocab"))
    )
    there = f"; {listed(others)} cannot be read without it" if others else ""
    return (
        f"{directory}: no tokenizer.json{there}. Copy it from the model's repository, or make one where sentencepiece"
        " and tiktoken are installed: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
    )


def _check_growth(file: Path, normalizer: Any) -> None:
    """Refuses normalizers that make a text many times longer, because their memory cannot be bounded."""
    growth, parts = 1, [normalizer]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            growth *= max(1, *(len(str(part.get(name, ""))) for name in ("content", "prepend")))
            parts += part["normalizers"] if isinstance(part.get("normalizers"), list) else []
        if growth > _GROWTH:
            raise CheckpointError(f"{file}: the normalizer makes a text more than {_GROWTH} times longer")


@contextlib.contextmanager
def tokenizer_panics() -> Iterator[None]:
    """Turns a panic of the tokenizers library, which is not an `Exception`, into an error.

    Raises:
      DataError: a pattern of the tokenizer gave up, or the tokenizer's data contradict each other.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizer failed on a text: {str(error)[:300]}") from error
