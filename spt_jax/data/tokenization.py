"""Encodes text as ids, both at the start of a sequence and as the continuation of other text."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers

from spt_jax.bases.tokenizer import Tokenizer, tokenizer_panics
from spt_jax.errors import DataError

# Text that is encoded before a continuation and then removed. The first that does not merge with it is used.
_ANCHORS = ("\n", "a", ".", "0", "\x00")

# Texts of at least this many characters are encoded as a batch of one: unlike `encode`, that lets other threads run.
_LONG = 2**12


class Tokenization:
    """Encodes plain text with a tokenizer, without BOS, EOS, truncation or padding.

    The names of control tokens are encoded as ordinary text: "</s>" in a user's message becomes its characters.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._whole = tokenizer
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ready: dict[str, tokenizers.Encoding] = {}

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all that ids depend on: the tokenizer, its control tokens and its chat template."""
        whole = self._whole
        more = [
            control_tokens(whole),
            whole.special_tokens_map,
            whole.bos_token_id,
            whole.eos_token_id,
            whole.chat_template,
        ]
        flags = [[content.content, content.lstrip, content.rstrip] for content in whole.added_tokens_decoder.values()]
        text = self._tokenizer.to_str() + json.dumps([more, flags, adds_bos(whole)], default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def opens_after_control(self) -> bool:
        """Whether the tokenizer encodes text after a control token as at the start of a sequence.

        Tokenizers like that of Llama 2 do: they normalize each text between control tokens separately.
        """
        names = control_tokens(self._whole)
        if not names or not self.adds_dummy_space:
            return False
        with tokenizer_panics():
            ids = self._whole(next(iter(names)) + "a", add_special_tokens=False)["input_ids"]
        return ids[1:] == self.opening("a") != self.continuation("a")

    @functools.cached_property
    def adds_dummy_space(self) -> bool:
        """Whether the tokenizer adds a space before the first word of a text (SentencePiece, as in Llama 2)."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        with tokenizer_panics():
            text = normalizer.normalize_str("a") if normalizer else "a"
            pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return "".join(pieces).startswith(("\u2581", "\u0120", " "))

    def opening(self, text: str) -> list[int]:
        """Returns the ids of a text that starts a sequence, with the space that the tokenizer may add there."""
        return self._encoding(text).ids

    def continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that follows something else: no space is added before it.

        Raises:
          DataError: the tokenizer merges the text with every anchor that is tried before it.
        """
        return self.aligned(text, opens=False)[0] if self.adds_dummy_space else self.opening(text)

    def aligned(self, text: str, *, opens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and for each id the character span (start, end) that it covers.

        Args:
          text: the text.
          opens: whether the text starts a sequence; otherwise it is a continuation.

        Raises:
          DataError: see `continuation`.
        """
        for anchor in ("",) if opens or not self.adds_dummy_space else _ANCHORS:
            front, whole = self.opening(anchor), self._encoding(anchor + text)
            if whole.ids[: len(front)] == front:
                offsets = whole.offsets[len(front) :]
                return whole.ids[len(front) :], [(first - len(anchor), last - len(anchor)) for first, last in offsets]
        raise DataError(f"the tokenizer cannot encode {text[:40]!r} as the continuation of a text")

    def first_tried(self, text: str, *, opens: bool) -> str:
        """Returns what the tokenizer is given for `aligned(text, opens=opens)`, unless that merges with the text.

        Args:
          text: the text.
          opens: whether the text starts a sequence.
        """
        return text if opens or not self.adds_dummy_space else _ANCHORS[0] + text

    @contextlib.contextmanager
    def prepared(self, texts: Sequence[str], *, spans: bool) -> Iterator[None]:
        """Context manager in which texts are already encoded: a batch is encoded faster, and on all cores.

        Args:
          texts: what `first_tried` returned. If the tokenizer cannot encode one of them, none is prepared, and
            `aligned` raises the error for that text.
          spans: whether `aligned` is asked for spans.
        """
        ready: dict[str, tokenizers.Encoding] = {}
        with contextlib.suppress(DataError, TypeError), tokenizer_panics():
            encode = self._tokenizer.encode_batch if spans else self._tokenizer.encode_batch_fast
            unique = list(dict.fromkeys(texts))
            ready = dict(zip(unique, encode(unique, add_special_tokens=False), strict=True))
        self._ready = ready
        try:
            yield
        finally:
            self._ready = {}

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if (ready := self._ready.get(text)) is not None:
            return ready
        try:
            with tokenizer_panics():
                if len(text) >= _LONG:
                    return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
                return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # raised by the Rust binding for invalid Unicode
            raise DataError(f"{text[:40]!r} contains half of a surrogate pair, which is not a character") from error


def adds_bos(tokenizer: Tokenizer, bos_id: int | None = None) -> bool:
    """Whether `tokenizer(text)` starts with the BOS token. GPT-2's tokenizer has a BOS token but does not add it.

    Args:
      tokenizer: the tokenizer.
      bos_id: the token that opens a sequence; default the tokenizer's BOS.
    """
    bos = tokenizer.bos_token_id if bos_id is None else bos_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@functools.lru_cache(maxsize=4)
def tokenization_of(tokenizer: Tokenizer) -> Tokenization:
    """Returns a cached `Tokenization`, shared by all encoders of a base: a large vocabulary takes tens of megabytes."""
    return Tokenization(tokenizer)


def check_ids(
    tokenizer: Tokenizer,
    ids: Sequence[int] | np.ndarray,
    vocab_size: int,
    virtual_tokens: int = 0,
    new_tokens: int = 0,
) -> None:
    """Checks that the model has an embedding for each id; a padding token that was added later may not have one.

    Args:
      tokenizer: the base's tokenizer.
      ids: the ids of a text or an example.
      vocab_size: the number of rows of the embedding table; virtual token i has the id `vocab_size + i`.
      virtual_tokens: the number of virtual tokens among the ids, which must be in order.
      new_tokens: the number of new tokens, whose ids follow those of the virtual ones, and may occur anywhere.

    Raises:
      DataError: another id is `vocab_size` or above.
    """
    array = np.asarray(ids)
    first = vocab_size + virtual_tokens
    beyond = array[(array >= vocab_size) & ~((array >= first) & (array < first + new_tokens))].tolist()
    for number, id_ in enumerate(beyond):
        if number >= virtual_tokens or id_ != vocab_size + number:
            raise DataError(
                f"the token {tokenizer.convert_ids_to_tokens(id_)!r} has id {id_}, but the model has {vocab_size}"
                " embeddings; leave it out of the text, or resize the model's embedding"
            )


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of a tokenizer's special tokens by name: the named ones, and all others added as special."""
    added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **{name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}}


class ControlTokens:
    """Finds a tokenizer's control tokens in literal text like the tokenizer itself: leftmost first, then longest."""

    def __init__(self, tokenizer: Tokenizer):
        self._ids = control_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._lstrip = {token.content for token in added.values() if token.lstrip}
        self._rstrip = {token.content for token in added.values() if token.rstrip}
        self._ends = {**{token.content: id_ for id_, token in added.items()}, **self._ids}
        self.pattern, self._end = _any_of(self._ids), _any_of(self._ends)

    def split(self, text: str) -> list[str | int]:
        """Splits text into the ids of its control tokens and the non-empty texts between them.

        A token that was added with `lstrip` or `rstrip` includes the whitespace on that side.
        """
        parts: list[str | int] = []
        last = 0
        for match in self.pattern.finditer(text):
            before = text[last : match.start()]
            before = before.rstrip() if match[0] in self._lstrip else before
            parts += [before] if before else []
            parts.append(self._ids[match[0]])
            last = match.end()
            if match[0] in self._rstrip:
                last = len(text) - len(text[last:].lstrip())
        return parts + ([text[last:]] if text[last:] else [])

    def end(self, text: str, at: int) -> tuple[int, int] | None:
        """Finds the added token that follows position `at`, ignoring whitespace between them.

        Tokens that are not declared special are found too, since such a token may end a turn.

        Returns:
          The position after the token, and its id; None if other text follows.
        """
        match = self._end.match(text, len(text) - len(text[at:].lstrip()))
        if match is None:
            return None
        rest = text[match.end() :]
        stop = len(text) - len(rest.lstrip()) if match[0] in self._rstrip else match.end()
        return stop, self._ends[match[0]]

    def swallowed(self, text: str, at: int) -> int:
        """Returns how many whitespace characters from position `at` belong to a control token before it."""
        front, rest = text[:at].rstrip(), text[at:]
        return len(rest) - len(rest.lstrip()) if front.endswith(tuple(self._rstrip)) else 0


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the names, preferring the longest."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")
