"""What cannot fit is found from the bytes of its text, before it is tokenized."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from spt_jax.data.templates import MESSAGES

# NFC makes a text at most three times shorter: the Kelvin sign of three bytes becomes the letter K.
_NFC = 3


@dataclasses.dataclass(frozen=True)
class TextBound:
    """How few tokens a text may have.

    Attributes:
      longest: bytes of text that one token stands for at most.
      folds_spaces: spaces may be dropped or joined, so that they are not counted.
    """

    longest: int
    folds_spaces: bool

    def bytes(self, text: str) -> int:
        """Bytes of a text that tokens must stand for."""
        return size(text.replace(" ", "") if self.folds_spaces else text)


def text_bound(tokenizer: Any) -> TextBound | None:
    """The bound of a fast tokenizer; None if it may drop or join other characters than spaces."""
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
    """The texts of a record: its fields, or the contents of its chat."""
    values = [turn["content"] for turn in record[MESSAGES]] if MESSAGES in record else record.values()
    return [value for value in values if isinstance(value, str)]


def size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text.encode())


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, or those that it consists of."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step.get("normalizers", step.get("pretokenizers", ())):
        yield from _steps(part)


def _folds_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a step removes or joins spaces, and nothing else."""
    return (
        step["type"] == "Replace"
        and set(step["pattern"].get("Regex", "x")) <= set(" +^$|")
        and step["content"] in ("", " ")
    )


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """Whether a step leaves at least as many bytes as it gets, NFC aside."""
    if step["type"] == "Replace":
        return "String" in step["pattern"] and size(step["content"]) >= size(step["pattern"]["String"])
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return step["type"] in ("NFC", "Prepend", "ByteLevel", "Digits", "Metaspace")
