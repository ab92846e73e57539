"""Pairs of texts: what a tokenizer puts between them, and the second token type."""

import dataclasses
from collections.abc import Sequence

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.templates import Cut, Piece, Separator, Text
from spt_jax.errors import ConfigError

SEPARATOR = "<sep>"


@dataclasses.dataclass(frozen=True)
class PairForm:
    """How a tokenizer joins two texts.

    Attributes:
      between: the ids between them, such as that of [SEP].
      first_type: how many of these ids have the first token type; None if the tokenizer has no token types.
    """

    between: tuple[int, ...]
    first_type: int | None


def pair_form(tokenizer: Tokenizer, front: Sequence[int], closing: Sequence[int]) -> PairForm | None:
    """Returns how a tokenizer joins two texts; None if it does so in another way than with ids between them.

    Args:
      tokenizer: the tokenizer.
      front: the ids that it puts before a text.
      closing: the ids that it puts after a text.
    """
    text = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    both = tokenizer(text="a", text_pair="a")
    ids = list(both["input_ids"])
    start, stop = len(front) + len(text), len(ids) - len(closing) - len(text)
    between = tuple(ids[start:stop])
    if stop < start or ids != [*front, *text, *between, *text, *closing]:
        return None
    types = list(both.get("token_type_ids", []))
    if not any(types):
        return PairForm(between, None)
    if 1 not in types:
        return None
    second = types.index(1)
    if not start <= second <= stop or types != [0] * second + [1] * (len(ids) - second):
        return None
    return PairForm(between, second - start)


def separated(pieces: Sequence[Piece | int], form: PairForm | None) -> list[Piece | int]:
    """Returns the pieces of a prompt with what the tokenizer puts between two texts in place of each `<sep>`.

    A `Cut` follows the tokens that still have the first type, after the last `<sep>`.

    Args:
      pieces: the pieces.
      form: the result of `pair_form`.

    Raises:
      ConfigError: there is a `<sep>`, and the tokenizer does not join texts in this way.
    """
    found: list[Piece | int] = []
    for piece in pieces:
        if not isinstance(piece, Text) or SEPARATOR not in piece.text:
            found.append(piece)
            continue
        if form is None:
            raise ConfigError("the tokenizer of this base puts two texts together in a way that <sep> does not support")
        first, *others = piece.text.split(SEPARATOR)
        found += [Text(first)] if first else []
        for other in others:
            found += [Separator(form.between), *([Text(other)] if other else [])]
    places = [place for place, piece in enumerate(found) if isinstance(piece, Separator)]
    if places and form is not None and form.first_type is not None:
        parts = [Separator(form.between[: form.first_type]), Cut(), Separator(form.between[form.first_type :])]
        found[places[-1] : places[-1] + 1] = parts
    return found
