"""What log-probabilities call tokens, of which many are only parts of characters."""

import dataclasses
import functools
import re
from typing import Any

from spt_jax.inference.generation import continuation_text, token_text


@dataclasses.dataclass(frozen=True)
class TokenName:
    """A token on its own.

    Attributes:
      text: its text; of a control token, its name in the vocabulary; of a part of a character, its bytes, escaped.
      bytes: what it stands for; None for a control token.
      is_partial: whether its bytes are not text without those of its neighbours.
    """

    text: str
    bytes: bytes | None
    is_partial: bool = False


@functools.lru_cache(2**16)
def token_name(tokenizer: Any, id_: int) -> TokenName:
    """The name of a token of a fast tokenizer; of ids that it does not have, <ID>."""
    text = continuation_text(tokenizer, [id_])
    if "\ufffd" in text:
        raw = _raw_bytes(tokenizer.convert_ids_to_tokens(id_) or "")
        try:
            raw.decode()
        except UnicodeDecodeError:
            return TokenName(escaped(raw), raw, is_partial=True)
    return TokenName(text, text.encode()) if text else TokenName(token_text(tokenizer, id_), None)


def escaped(raw: bytes) -> str:
    """Bytes as OpenAI's chat completions write them: \\xf0\\x9f."""
    return "".join(f"\\x{byte:02x}" for byte in raw)


def _raw_bytes(token: str) -> bytes:
    """The bytes of a token whose text is not whole: a byte-fallback token, or one of a byte-level vocabulary."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(found[1])
    return bytes(_BYTES[character] for character in token if character in _BYTES)


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary, as GPT-2's encoder.py maps them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
