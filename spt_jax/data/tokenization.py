"""Text to ids, for text that opens a sequence and for text that continues one."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from spt_jax.errors import DataError
from spt_jax.models.tokenizer import tokenizer_panics

# Text that is encoded in front of a continuation and cut off again. The first that does not merge with it is used.
_ANCHORS = ("\n", "a", ".", "0", "\x00")


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
        try:
            with tokenizer_panics():
                return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # the binding's way to refuse what is not valid Unicode
            raise DataError(f"{text[:40]!r} holds half of a surrogate pair, which is not a character") from error


def adds_bos(tokenizer: Any) -> bool:
    """Whether `tokenizer(text)` puts the BOS token first. GPT-2 has a BOS token and does not."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@functools.lru_cache(maxsize=4)
def tokenization_of(tokenizer: Any) -> Tokenization:
    """One for all encoders of a base: a large vocabulary takes tens of megabytes."""
    return Tokenization(tokenizer)


def check_ids(tokenizer: Any, ids: Sequence[int] | np.ndarray, vocab_size: int, virtual_tokens: int = 0) -> None:
    """Refuses tokens that a tokenizer has and its model does not, such as a padding token that was added later.

    Args:
      tokenizer: the base's.
      ids: of a text or an example.
      vocab_size: rows of the embedding table; virtual token i has the id `vocab_size + i`.
      virtual_tokens: how many virtual tokens are among the ids, in order.

    Raises:
      DataError: there is another id of `vocab_size` or above.
    """
    beyond = [int(id_) for id_ in ids if id_ >= vocab_size]
    for number, id_ in enumerate(beyond):
        if number >= virtual_tokens or id_ != vocab_size + number:
            raise DataError(
                f"the token {tokenizer.convert_ids_to_tokens(id_)!r} has id {id_}, but the model has {vocab_size}"
                " embeddings; leave it out of the text, or resize the model's embedding"
            )
