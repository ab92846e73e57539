"""Encodes the pieces of a prompt, a target or a chat as token ids, some of them virtual."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.templates import Bos, Control, Cut, Field, Piece, Plain, Read, Separator, Text, Virtual
from spt_jax.data.tokenization import ControlTokens, tokenization_of
from spt_jax.data.tokenization import adds_bos as tokenizer_adds_bos
from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Joined:
    """A text that adjacent pieces form.

    Attributes:
      text: the text.
      opens: whether it starts a sequence.
      read: the start of the field whose spans are wanted, its length and its skipped characters; None for no field.
    """

    text: str
    opens: bool
    read: tuple[int, int, int] | None


class PieceEncoder:
    """Encodes pieces with one tokenizer. Adjacent text and fields are encoded as one text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        virtual_tokens: int,
        *,
        adds_bos: bool,
        bos_id: int | None = None,
        new_tokens: Sequence[str] = (),
    ):
        """Args:
        tokenizer: the base's tokenizer.
        vocab_size: virtual token i has the id `vocab_size + i`.
        virtual_tokens: the number of virtual tokens that a `Virtual` without a count stands for.
        adds_bos: whether BOS goes first in a sequence that has no `Bos` piece, if the tokenizer itself adds one. False
          for chats, which have BOS only where the chat template writes it.
        bos_id: the token that opens a sequence; default the tokenizer's BOS.
        new_tokens: names in literal text that stand for the ids after those of the virtual tokens.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._virtual_tokens = virtual_tokens
        self._tokenization = tokenization_of(tokenizer)
        self._split = functools.lru_cache(maxsize=64)(ControlTokens(tokenizer).split)  # the same text in every record
        self._new = {name: vocab_size + virtual_tokens + i for i, name in enumerate(new_tokens)}
        longest_first = sorted(self._new, key=len, reverse=True)
        self._new_name = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self._new else None
        self._bos_id = tokenizer.bos_token_id if bos_id is None else bos_id
        self._adds_bos = adds_bos and tokenizer_adds_bos(tokenizer, self._bos_id)

    def after(self, front: Sequence[Piece | int], pieces: Sequence[Piece]) -> list[int]:
        """Returns the ids of pieces that follow `front`, encoded without merging across the boundary."""
        opens = isinstance(front[-1], Control) and self._tokenization.opens_after_control
        return self._run(pieces, {}, opens, None)[0]

    def aligned(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool, field: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Returns the ids of pieces, and the positions of a field and of the cuts.

        Args:
          pieces: the pieces in order; integers are ids.
          fields: the text of each `Field`.
          opens: whether the pieces start the sequence; BOS then goes first, unless there is a `Bos` piece.
          field: the name of the field whose character spans are returned.

        Returns:
          The ids, for each id the character span (start, end) of the field that it covers, and for each `Cut` the
          number of ids before it.

        Raises:
          ConfigError: there is a `Bos` piece, but the tokenizer has no BOS.
        """
        ids, spans, cuts = self._run(pieces, fields, opens, field)
        bos = self._bos_id
        if not (opens and self._adds_bos) or Bos() in pieces or bos is None:
            return ids, spans, cuts
        return [bos, *ids], [(0, 0), *spans], [cut + 1 for cut in cuts]

    def split_controls(self, pieces: Sequence[Piece | int]) -> Iterator[Piece | int]:
        """Splits literal text at the tokenizer's control tokens and at new tokens, which become ids."""
        for piece in pieces:
            if not isinstance(piece, Text):
                yield piece
                continue
            for part in [piece.text] if self._new_name is None else self._new_name.split(piece.text):
                if part in self._new:
                    yield self._new[part]
                else:
                    yield from (Text(own) if isinstance(own, str) else own for own in self._split(part))

    def _run(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], at_start: bool, field: str | None
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        cuts: list[int] = []
        next_virtual = 0
        for part in self._parts(pieces, fields, at_start, field):
            if isinstance(part, _Joined):
                more, covered = self._encoded(part.text, part.opens, aligned=part.read is not None)
                spans += [(0, 0)] * (len(ids) - len(spans)) + (_within(covered, *part.read) if part.read else [])
                ids += more
            elif isinstance(part, Cut):
                cuts.append(len(ids))
            elif isinstance(part, Bos):
                ids.append(self._bos())
            elif isinstance(part, Control):
                ids.append(part.id)
            elif isinstance(part, Separator):
                ids += part.ids
            elif isinstance(part, int):
                ids.append(part)
            elif isinstance(part, Virtual):
                count = self._count(part)
                ids += range(self._vocab_size + next_virtual, self._vocab_size + next_virtual + count)
                next_virtual += count
        return ids, spans + [(0, 0)] * (len(ids) - len(spans)), cuts[:-1]

    def _parts(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], at_start: bool, field: str | None
    ) -> Iterator["_Joined | Piece | int"]:
        """Yields the texts that adjacent pieces form, and the pieces between them. The last one is a `Cut`."""
        run, placed = "", 0
        read: tuple[int, int, int] | None = None  # the field's start in the run, its length, its skipped characters
        for piece in [*self.split_controls(pieces), Cut()]:
            if isinstance(piece, Field):
                value = fields[piece.name]
                read = (len(run), len(value), 0) if piece.name == field else read
                run += value
            elif isinstance(piece, Read):
                read = len(run), len(piece.text), piece.skipped
                run += piece.text
            elif isinstance(piece, Text | Plain):
                run += piece.text
            else:
                if run:
                    yield _Joined(run, at_start, read)
                    at_start, run, read = False, "", None
                yield piece
                if isinstance(piece, Bos):
                    # PEFT puts virtual tokens before the ids of `tokenizer(text)`, where the text directly follows BOS.
                    at_start = at_start or placed > 0
                elif isinstance(piece, Control):
                    at_start = self._tokenization.opens_after_control
                elif isinstance(piece, Separator):
                    at_start = True
                elif isinstance(piece, int):
                    at_start = False
                elif isinstance(piece, Virtual):
                    placed += self._count(piece)
                    at_start = False

    def _count(self, virtual: Virtual) -> int:
        return self._virtual_tokens if virtual.count is None else virtual.count

    def texts(self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool) -> list[str]:
        """Returns the texts that the tokenizer encodes for `aligned`, for `prepared`. The arguments are those of it."""
        parts = (part for part in self._parts(pieces, fields, opens, None) if isinstance(part, _Joined))
        return [self._tokenization.first_tried(part.text, opens=part.opens) for part in parts]

    def prepared(self, texts: Sequence[str], *, spans: bool) -> contextlib.AbstractContextManager[None]:
        """Context manager in which these texts are already encoded, in one batch.

        Args:
          texts: the texts, as from `texts`.
          spans: whether the character spans of ids will be asked for.
        """
        return self._tokenization.prepared(texts, spans=spans)

    def _encoded(self, run: str, at_start: bool, *, aligned: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if aligned:
            return self._tokenization.aligned(run, opens=at_start)
        return self._tokenization.opening(run) if at_start else self._tokenization.continuation(run), []

    def _bos(self) -> int:
        if self._bos_id is None:
            raise ConfigError("the template has <bos>, but the tokenizer has no BOS")
        return self._bos_id


def after_cut(pieces: Sequence[Piece]) -> list[Piece]:
    """Returns the pieces after the first `Cut`."""
    return [*pieces[pieces.index(Cut()) + 1 :]]


def _within(spans: Sequence[tuple[int, int]], begin: int, length: int, skipped: int) -> list[tuple[int, int]]:
    """Converts character spans of a text to spans of a field in it; (0, 0) for spans outside the field.

    Args:
      spans: character spans (start, end) of the text.
      begin, length: where the field begins in the text, and how many of its characters are there.
      skipped: how many characters of the field come before those.
    """
    clipped = [(max(first - begin, 0), min(last - begin, length)) for first, last in spans]
    return [(first + skipped, last + skipped) if last > first else (0, 0) for first, last in clipped]
