"""Where a text that the prefix of a prompt holds ends, and the template whose examples continue it.

The tokens at the end of a text may merge with what follows: "wor" and "ld" are one token. The prefix therefore holds
only the first ids that the text has whatever follows, and the rest of the text is part of the template.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import encoder_for
from spt_jax.data.pieces import PieceEncoder
from spt_jax.data.templates import MESSAGES, Bos, Piece, Plain, Template, Text
from spt_jax.data.tokenization import check_ids, control_tokens
from spt_jax.errors import ConfigError, DataError

# Texts that might follow. Each starts differently, and some merge with letters, digits, blanks or punctuation.
_NEXT = ("a", " a", "The", "s", "1", " 1", "\n", "\n\n", " ", ".", "?", ":", '"', "(", "é", "中")
# Chats that might follow a system turn.
_CHATS = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "\n1"}],
    [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}],
)
# The most characters of the text that are left to the template.
_MAX_REST = 64
# No token stands for more characters.
_MAX_TOKEN = 512
_WORD = re.compile(r"\s?\w{1,40}\Z")
_MARKUP = re.compile(r"<soft(:\d+)?>|<bos>")

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Remembered:
    """The ids of a text for a prefix, and how to continue it.

    Attributes:
      ids: the first ids of the text, with BOS if the tokenizer adds one, or of a chat with the text as system turn.
      template: the template of examples that follow the ids.
    """

    ids: Int[np.ndarray, " P"]
    template: Template


def remembered_text(base: FrozenBase, text: str, *, control_tokens: bool = False) -> Remembered:
    """Returns the ids of a text, and a template whose only field, `text`, continues it.

    Args:
      base: the frozen base.
      text: the text.
      control_tokens: whether names of control tokens in the text are control tokens; otherwise they are plain text.

    Raises:
      DataError: the text is empty, cannot be encoded, or cannot be continued.
    """
    _check_text(base, text)
    pieces = PieceEncoder(base.tokenizer, base.layout.vocab_size, 0, adds_bos=True)
    front: list[Piece] = [Plain(text)]
    if control_tokens:
        bos_id = base.tokenizer.bos_token_id
        bos = None if bos_id is None else base.tokenizer.convert_ids_to_tokens(bos_id)
        front = [Bos(), Text(text.removeprefix(bos))] if bos and text.startswith(bos) else [Text(text)]

    _check_length(base, pieces.aligned(front, {}, opens=True)[0])

    def template(rest: str) -> Template:
        return Template(prompt=f"{_escaped(rest)}{{text}}", target="{target}", continues=True)

    def after(rest: str) -> list[Ids]:
        encoder = encoder_for(base, template(rest))
        return [encoder.prompt_ids({"text": following}).tolist() for following in _NEXT]

    whole = [pieces.aligned([*front, Plain(following)], {}, opens=True)[0] for following in _NEXT]
    word = _WORD.search(text)
    least = 0 if word is None or len(word[0]) == len(text) else len(word[0])
    found = _split(base, text, whole, after, least)
    if found is None:
        raise DataError(
            f"the tokens at the end of the text, {text[-20:]!r}, depend on what follows it; end the text with a newline"
        )
    ids, rest = found
    return Remembered(ids, template(rest))


def text_ids(base: FrozenBase, text: str) -> Int[np.ndarray, " P"]:
    """Returns all ids of a text that opens a sequence, with BOS if the tokenizer adds one.

    Unlike `remembered_text`, it keeps the ids at the end that would merge with what follows.

    Args:
      base: the frozen base.
      text: the text, all of which is plain text.

    Raises:
      DataError: the text is empty, or leaves no position of the base for anything else.
    """
    _check_text(base, text)
    pieces = PieceEncoder(base.tokenizer, base.layout.vocab_size, 0, adds_bos=True)
    ids = pieces.aligned([Plain(text)], {}, opens=True)[0]
    _check_length(base, ids)
    return np.asarray(ids, np.int32)


def system_ids(base: FrozenBase, text: str) -> Int[np.ndarray, " P"]:
    """Returns the ids that a text as system turn adds at the beginning of every chat, with BOS if chats have one.

    Args:
      base: the frozen base.
      text: the text of the system turn.

    Raises:
      ConfigError: the base has no chat template, or a chat with the system turn does not end in the chat without it.
      DataError: the text is empty, or leaves no position of the base for anything else.
    """
    _check_text(base, text)
    encoder, bos = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}")), base.tokenizer.bos_token_id
    system = {"role": "system", "content": text}
    found = []
    for chat in _CHATS:
        whole, alone = (encoder.prompt_ids({MESSAGES: turns}).tolist() for turns in ([system, *chat], chat))
        rest = alone[1:] if alone[0] == bos == whole[0] else alone
        _check_length(base, whole)
        if whole[-len(rest) :] != rest or (found and whole[: -len(rest)] != found):
            raise ConfigError(
                "the chat template does not write a system turn and then the same chat as without it, so the text"
                " cannot take the place of a soft prompt there, such as where it writes another one by default; leave"
                " out chat_system, or train a prefix with data.continues, which replaces the system turn"
            )
        found = whole[: -len(rest)]
    return np.asarray(found, np.int32)


def remembered_system(base: FrozenBase, text: str) -> Remembered:
    """Returns the ids of a chat up to the end of its system turn, and the template of the chats that follow.

    Args:
      base: the frozen base.
      text: the text of the system turn.

    Raises:
      ConfigError: the base has no chat template, or it does not begin each chat with the system turn.
      DataError: the text is empty, or cannot be encoded.
    """
    _check_text(base, text)
    plain = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}"))
    system = {"role": "system", "content": text}
    first = plain.prompt_ids({MESSAGES: [system, *_CHATS[0]]}).tolist()
    _check_length(base, first)
    whole = [first, *(plain.prompt_ids({MESSAGES: [system, *chat]}).tolist() for chat in _CHATS[1:])]

    def template(rest: str) -> Template:
        return Template(prompt=f"{{{MESSAGES}}}", system=rest, continues=True)

    def after(rest: str) -> list[Ids]:
        encoder = encoder_for(base, template(rest))
        return [encoder.prompt_ids({MESSAGES: chat}).tolist() for chat in _CHATS]

    found = _split(base, text, whole, after, 0)
    if found is None:
        raise ConfigError(
            "the chat template does not begin every chat with its system turn, or changes the end of its text; remember"
            " the text without chat_system"
        )
    ids, rest = found
    return Remembered(ids, template(rest))


def _check_text(base: FrozenBase, text: str) -> None:
    """Refuses a text without words, and one that is too long however it is encoded."""
    if not text.strip():
        raise DataError("the text is empty, so there is nothing to remember")
    positions = base.layout.max_positions
    if len(text) > positions * _MAX_TOKEN:
        raise DataError(
            f"the text has {len(text):,} characters, too many for the {positions:,} positions of {base.name}"
        )


def _check_length(base: FrozenBase, ids: Ids) -> None:
    """Refuses a text that leaves no position for a request."""
    count, positions = len(ids), base.layout.max_positions
    if count >= positions:
        raise DataError(
            f"the text has {count:,} tokens and {base.name} has {positions:,} positions, one of which must be left;"
            " shorten the text"
        )


def _split(
    base: FrozenBase, text: str, whole: Sequence[Ids], after: Callable[[str], list[Ids]], least: int
) -> tuple[Int[np.ndarray, " P"], str] | None:
    """Returns the ids before the shortest rest of the text that can be encoded separately, and that rest.

    Args:
      base: the frozen base.
      text: the text.
      whole: the ids of the text with each text that may follow.
      after: returns the ids of a rest of the text with each of them, as a continuation.
      least: the number of characters that the rest has at least.
    """
    names = control_tokens(base.tokenizer)
    for count in range(least, min(least + _MAX_REST, len(text)) + 1):
        rest = text[len(text) - count :]
        if _MARKUP.search(rest) or any(name in rest for name in names):
            continue
        ends = after(rest)
        fronts = [ids[: len(ids) - len(end)] for ids, end in zip(whole, ends, strict=True)]
        same = all(front == fronts[0] for front in fronts)
        if same and fronts[0] and all(a[len(a) - len(b) :] == b for a, b in zip(whole, ends, strict=True)):
            check_ids(base.tokenizer, fronts[0], base.layout.vocab_size)
            return np.asarray(fronts[0], np.int32), rest
    return None


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
