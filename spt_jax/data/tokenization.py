"""Text to ids, for text that opens a sequence and for text that continues one."""

import functools
from typing import Any

import tokenizers

from spt_jax.errors import DataError

# Text that is encoded in front of a continuation and cut off again. The first that does not merge with it is used.
_ANCHORS = ("\n", "a", ".", "0", "\x00")

# From how many characters on a text is encoded as a batch of one: other threads run meanwhile, which `encode` prevents.
_LONG = 2**12


class Tokenization:
    """A tokenizer's plain text encoding, with no BOS, EOS, truncation or padding.

    Control tokens that appear in text are text: "</s>" in a user's message encodes as its characters.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @functools.cached_property
    def adds_dummy_space(self) -> bool:
        """True for tokenizers that put a space in front of a text's first word (SentencePiece, as in Llama 2)."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str("a") if normalizer else "a"
        first = splitter.pre_tokenize_str(text)[0][0] if splitter else text
        return first.startswith(("\u2581", "\u0120", " "))

    def opening(self, text: str) -> list[int]:
        """Ids of a text that opens a sequence, with whatever space the tokenizer puts there."""
        return self._encoding(text).ids

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that follows something else: no space is put in front of it.

        Raises:
          DataError: the tokenizer merges the text with everything tried in front of it.
        """
        return self.aligned(text, opens=False)[0] if self.adds_dummy_space else self.opening(text)

    def aligned(self, text: str, *, opens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of an opening text or a continuation, and for each the characters (from, to) of the text it stands for.

        Raises:
          DataError: as `continuation`.
        """
        for anchor in ("",) if opens or not self.adds_dummy_space else _ANCHORS:
            front, whole = self.opening(anchor), self._encoding(anchor + text)
            if whole.ids[: len(front)] == front:
                offsets = whole.offsets[len(front) :]
                return whole.ids[len(front) :], [(first - len(anchor), last - len(anchor)) for first, last in offsets]
        raise DataError(f"the tokenizer cannot encode {text[:40]!r} as the continuation of a text")

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if len(text) >= _LONG:
            return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return self._tokenizer.encode(text, add_special_tokens=False)


@functools.lru_cache(maxsize=4)
def tokenization_of(tokenizer: Any) -> Tokenization:
    """One for all encoders of a base: a large vocabulary takes tens of megabytes."""
    return Tokenization(tokenizer)
