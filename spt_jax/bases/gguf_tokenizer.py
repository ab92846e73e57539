"""The tokenizer in a GGUF file's metadata, written in Hugging Face format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from spt_jax.bases.gguf_header import Value
from spt_jax.bases.tokenizer import tokenizer_panics
from spt_jax.errors import CheckpointError
from spt_jax.runtime.hf_library import import_transformers

_KEY = "tokenizer.ggml."
# Byte-level BPE splits a text by the pattern of GPT-2, or by it after taking each digit apart.
_OF_GPT2 = ("gpt-2", "default", "olmo", "jais", "mpt")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Types of tokens: of control, and defined by users.
_WHOLE = (3, 4)
# Other ids that end an answer: of a turn, and of a message.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def write_tokenizer(directory: Path, file: Path, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tokenizer and the chat template.

    Args:
      directory: where tokenizer.json and tokenizer_config.json are written.
      file: the GGUF file, for messages.
      architecture: `general.architecture`, which decides between variants of sentencepiece's tokenizers.
      metadata: the file's.

    Returns:
      The ids that config.json holds: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
      CheckpointError: there is no tokenizer, it contradicts itself, or its kind is not supported.
    """
    conversion = _conversion(file)
    fields = {key.removeprefix(_KEY): value for key, value in metadata.items() if key.startswith(_KEY)}
    tokens = _checked(file, fields, conversion.GGUF_PRE_TOKENIZER_SPLITS)
    ids = {key: _id(file, fields, key, len(tokens)) for key in {*_SPECIAL.values(), *_ENDS}}
    named = {name: tokens[id_] for name, key in _SPECIAL.items() if (id_ := ids[key]) is not None}
    start = named.get("bos_token") if _flag(file, fields, "add_bos_token", fields["model"] == "llama") else None
    end = named.get("eos_token") if _flag(file, fields, "add_eos_token", False) else None
    _flag(file, fields, "add_space_prefix", True)
    try:
        with tokenizer_panics():
            backend = _without_others(_backend(conversion, architecture, fields), len(tokens))
            _check_whole(file, backend, tokens, fields.get("token_type"), ids)
            _add_marks(file, backend, start, end)
            _save(directory, backend, named, metadata.get("tokenizer.chat_template"))
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # transformers and tokenizers raise anything for vocabularies that are wrong
        raise CheckpointError(
            f"{file}: the tokenizer cannot be read ({type(error).__name__}: {str(error)[:500]})"
        ) from error
    ends = sorted({id_ for key in _ENDS if (id_ := ids[key]) is not None})
    return {"bos_token_id": ids["bos_token_id"], "eos_token_id": ends or None, "pad_token_id": ids["padding_token_id"]}


def _check_whole(
    file: Path, backend: Any, tokens: Sequence[str], kinds: Sequence[int] | None, ids: Mapping[str, int | None]
) -> None:
    """Checks that tokens that texts contain whole are not split."""
    added = backend.get_added_tokens_decoder()
    for id_, (token, kind) in enumerate(zip(tokens, kinds or [1] * len(tokens), strict=True)):
        split = kind in _WHOLE and id_ not in added and not _is_run_of_blanks(backend, id_, token)
        if split or (id_ in ids.values() and backend.token_to_id(token) != id_):
            raise CheckpointError(
                f"{file}: token {id_}, {token[:100]!r}, is one that texts contain whole, and transformers'"
                " reader of GGUF vocabularies would split it; use the model's files in Hugging Face format"
            )


def _add_marks(file: Path, backend: Any, start: str | None, end: str | None) -> None:
    """Adds the tokens before and after each text."""
    from tokenizers import processors

    marks = [token for token in (start, end) if token is not None]
    if not marks:
        return
    single = [token for token in (start, "$A", end) if token is not None]
    ids = [backend.token_to_id(token) for token in marks]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=list(zip(marks, ids, strict=True))
    )
    if backend.encode("").ids != ids:  # such as "$A", which stands for the text
        raise CheckpointError(f"{file}: {marks!r:.200} cannot be put around texts; give those tokens other names")


def _save(directory: Path, backend: Any, named: Mapping[str, str], template: Value | None) -> None:
    transformers = import_transformers()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    if isinstance(template, str):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def _checked(file: Path, fields: Mapping[str, Any], patterns: Mapping[str, str]) -> list[str]:
    """Returns the tokens, after checking the fields that the tokenizer is built from.

    Args:
      file: the GGUF file, for messages.
      fields: the metadata of the tokenizer.
      patterns: those that transformers knows, by the names of pre-tokenizers.
    """
    if fields.get("model") not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file}: the tokenizer {fields.get('model')!r:.60} is not supported; gpt2 (byte-level BPE) and llama"
            " (sentencepiece) are"
        )
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{file}: {_KEY}tokens must be a list of strings")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file}: {_KEY}tokens has a token twice")
    for name, kind in (("scores", float), ("token_type", int)):
        found = fields.get(name)
        if found is not None and (
            not isinstance(found, list) or len(found) != len(tokens) or any(type(item) is not kind for item in found)
        ):
            raise CheckpointError(f"{file}: {_KEY}{name} must be a list of a {kind.__name__} for each token")
    merges = fields.get("merges")
    if merges is not None and (not isinstance(merges, list) or not all(isinstance(one, str) for one in merges)):
        raise CheckpointError(f"{file}: {_KEY}merges must be a list of strings")
    if fields["model"] == "gpt2" and merges is None:
        raise CheckpointError(f"{file}: no {_KEY}merges")
    if fields["model"] == "llama" and merges is None and fields.get("scores") is None:
        raise CheckpointError(f"{file}: neither {_KEY}merges nor {_KEY}scores")
    pre = fields.get("pre", "default")
    known = {*_OF_GPT2, *_DIGITS_FIRST, *patterns}
    if fields["model"] == "gpt2" and (not isinstance(pre, str) or pre not in known):
        raise CheckpointError(
            f"{file}: the pre-tokenizer {pre!r:.60} is not supported; supported are {', '.join(sorted(known))}"
        )
    return tokens


def _id(file: Path, fields: Mapping[str, Any], key: str, count: int) -> int | None:
    found = fields.get(key)
    if found is not None and (type(found) is not int or not 0 <= found < count):
        raise CheckpointError(f"{file}: {_KEY}{key} is {found!r:.60}; the vocabulary has {count} tokens")
    return found


def _flag(file: Path, fields: Mapping[str, Any], key: str, default: bool) -> bool:
    found = fields.get(key, default)
    if type(found) is not bool:
        raise CheckpointError(f"{file}: {_KEY}{key} is {found!r:.60}; it must be true or false")
    return found


def _backend(conversion: ModuleType, architecture: str, fields: Mapping[str, Any]) -> Any:
    from tokenizers import normalizers, pre_tokenizers

    described = {"tokenizer_type": fields["model"], "pre_tokenizer_type": fields.get("pre"), **fields}
    backend, _ = conversion.convert_gguf_tokenizer(architecture, described)
    if fields["model"] == "gpt2" and fields.get("pre") in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    if fields["model"] == "llama":
        # As Llama 2's own tokenizer: each text between control tokens starts with a space, besides its own ones.
        start = [normalizers.Prepend("\u2581")] if fields.get("add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
    return backend


def _without_others(backend: Any, count: int) -> Any:
    """Returns the tokenizer without tokens that transformers adds to those of the file, such as an unknown token."""
    import tokenizers

    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _is_run_of_blanks(backend: Any, id_: int, token: str) -> bool:
    """Returns whether a token is blanks alone, which merges build: Gemma's files define such tokens."""
    return not token.strip(" ") and backend.encode(token, add_special_tokens=False).ids == [id_]


def _conversion(file: Path) -> ModuleType:
    """Returns transformers' module that builds tokenizers from the metadata of GGUF files."""
    transformers = import_transformers()
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError as error:
        raise CheckpointError(
            f"{file}: reading its tokenizer needs transformers 5.23 or newer, and {transformers.__version__} is"
            " installed: pip install -U 'transformers>=5.23'"
        ) from error
    return gguf_tokenizer_mapping
