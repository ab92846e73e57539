"""Rejects texts that are too long from their size in bytes, before they are tokenized."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.templates import MESSAGES

# NFC makes a text at most three times shorter: the Kelvin sign of three bytes becomes the letter K.
_NFC = 3


@dataclasses.dataclass(frozen=True)
class TextBound:
    """A lower bound on the number of tokens of a text.

    Attributes:
      longest: the most bytes of text that one token can stand for.
      folds_spaces: whether spaces may be dropped or joined; if so, they are not counted.
    """

    longest: int
    folds_spaces: bool

    def bytes(self, text: str) -> int:
        """Returns the number of bytes of a text that tokens must stand for."""
        return size(text.replace(" ", "") if self.folds_spaces else text)


def text_bound(tokenizer: Tokenizer) -> TextBound | None:
    """Returns the bound of a fast tokenizer; None if it may drop or join characters other than spaces."""
    specification = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = [*_steps(specification["normalizer"]), *_steps(specification["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    added = [token for token in specification["added_tokens"] if not token["special"]]  # special ones are plain text
    vocabulary = specification["model"]["vocab"] if specification["model"]["type"] == "BPE" else {}
    if "ByteLevel" in kinds:
        complete, measure = sum(len(token) == 1 for token in vocabulary) >= 256, len
    else:
        complete, measure = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)), size
        complete = complete and specification["model"]["byte_fallback"]
    folding = [step for step in steps if _folds_spaces(step)]
    if (
        not complete
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not all(_keeps_text(step) for step in steps if step not in folding)
    ):
        return None
    longest = max([*map(measure, vocabulary), *(size(token["content"]) for token in added)])
    return TextBound(longest * (_NFC if "NFC" in kinds else 1), bool(folding))


def texts_of(record: Mapping[str, Any]) -> list[str]:
    """Returns the texts of a record: its fields, or the contents of its chat."""
    values = [turn["content"] for turn in record[MESSAGES]] if MESSAGES in record else record.values()
    return [value for value in values if isinstance(value, str)]


def size(text: str) -> int:
    """Returns the number of bytes of a text in UTF-8."""
    return len(text.encode())


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yields a normalizer or pre-tokenizer, or the parts of a sequence."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step.get("normalizers", step.get("pretokenizers", ())):
        yield from _steps(part)


def _folds_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a step only removes or joins spaces."""
    return (
        step["type"] == "Replace"
        and set(step["pattern"].get("Regex", "x")) <= set(" +^$|")
        and step["content"] in ("", " ")
    )


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """Whether a step's output has at least as many bytes as its input, apart from NFC."""
    if step["type"] == "Replace":
        return "String" in step["pattern"] and size(step["content"]) >= size(step["pattern"]["String"])
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return step["type"] in ("NFC", "Prepend", "ByteLevel", "Digits", "Metaspace")
