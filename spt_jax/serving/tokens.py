"""Names of tokens in log-probabilities; many tokens are only parts of characters."""

import dataclasses
import functools
import re

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.inference.answers import continuation_text, token_text


@dataclasses.dataclass(frozen=True)
class TokenName:
    """The name of a single token.

    Attributes:
      text: the token's text; for a control token, its name in the vocabulary; for part of a character, its escaped
        bytes.
      bytes: the bytes that the token stands for; None for a control token.
      is_partial: whether the bytes are only part of a character.
    """

    text: str
    bytes: bytes | None
    is_partial: bool = False


@functools.lru_cache(2**16)
def token_name(tokenizer: Tokenizer, id_: int) -> TokenName:
    """Returns the name of a token of a fast tokenizer; <ID> for an id that the tokenizer does not have."""
    text = continuation_text(tokenizer, [id_])
    if "\ufffd" in text:
        raw = _raw_bytes(tokenizer.convert_ids_to_tokens(id_) or "")
        try:
            raw.decode()
        except UnicodeDecodeError:
            return TokenName(escaped(raw), raw, is_partial=True)
    return TokenName(text, text.encode()) if text else TokenName(token_text(tokenizer, id_), None)


def escaped(raw: bytes) -> str:
    """Returns bytes in the notation of OpenAI's chat completions: \\xf0\\x9f."""
    return "".join(f"\\x{byte:02x}" for byte in raw)


def _raw_bytes(token: str) -> bytes:
    """Returns the bytes of a byte-fallback token or of a token of a byte-level vocabulary."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(found[1])
    return bytes(_BYTES[character] for character in token if character in _BYTES)


def _byte_level_alphabet() -> dict[str, int]:
    """Returns the byte of each character of a byte-level vocabulary, as in GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
