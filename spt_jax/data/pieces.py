"""Pieces of a prompt, a target or a chat to token ids, some of them virtual."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spt_jax.data.templates import Bos, Control, Cut, Field, Piece, Plain, Read, Text, Virtual
from spt_jax.data.tokenization import ControlTokens, tokenization_of
from spt_jax.data.tokenization import adds_bos as tokenizer_adds_bos
from spt_jax.errors import ConfigError


class PieceEncoder:
    """Encodes pieces for one tokenizer. Text and fields that touch are encoded as one text."""

    def __init__(self, tokenizer: Any, vocab_size: int, virtual_tokens: int, *, adds_bos: bool):
        """Args:
        tokenizer: the base's.
        vocab_size: virtual token i has the id `vocab_size + i`.
        virtual_tokens: what a `Virtual` without a number stands for.
        adds_bos: BOS opens a sequence whose pieces do not say where it goes, if the tokenizer itself adds one. In a
          chat, it stands only where the chat template writes it.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._virtual_tokens = virtual_tokens
        self._tokenization = tokenization_of(tokenizer)
        self._controls = ControlTokens(tokenizer)
        self._adds_bos = adds_bos and tokenizer_adds_bos(tokenizer)

    def after(self, front: Sequence[Piece | int], pieces: Sequence[Piece]) -> list[int]:
        """Ids of pieces that follow others, which are encoded without regard to them."""
        opens = isinstance(front[-1], Control) and self._tokenization.opens_after_control
        return self._run(pieces, {}, opens, None)[0]

    def aligned(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool, field: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Ids of pieces, and where their parts are.

        Args:
          pieces: in order; integers are ids.
          fields: the text of every `Field`.
          opens: the pieces start the sequence, so that BOS goes first unless a piece says where.
          field: one of the fields, for which the second result says which of its characters each id covers.

        Returns:
          The ids, the characters (from, to) of the field, and for every `Cut` the number of ids before it.

        Raises:
          ConfigError: a `Bos`, and the tokenizer has none.
        """
        ids, spans, cuts = self._run(pieces, fields, opens, field)
        if not (opens and self._adds_bos) or Bos() in pieces:
            return ids, spans, cuts
        return [self._tokenizer.bos_token_id, *ids], [(0, 0), *spans], [cut + 1 for cut in cuts]

    def split_controls(self, pieces: Sequence[Piece | int]) -> Iterator[Piece | int]:
        """Cuts literal text at the tokenizer's control tokens, which become ids."""
        for piece in pieces:
            if isinstance(piece, Text):
                yield from (Text(part) if isinstance(part, str) else part for part in self._controls.split(piece.text))
            else:
                yield piece

    def _run(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], at_start: bool, field: str | None
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        cuts: list[int] = []
        run, next_virtual = "", 0
        read: tuple[int, int, int] | None = None  # where the field begins in the run, its length, and what it skips
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
                    more, covered = self._encoded(run, at_start, aligned=read is not None)
                    spans += [(0, 0)] * (len(ids) - len(spans)) + (_within(covered, *read) if read else [])
                    ids += more
                    at_start, run, read = False, "", None
                if isinstance(piece, Cut):
                    cuts.append(len(ids))
                elif isinstance(piece, Bos):
                    ids.append(self._bos())
                    # PEFT puts its virtual tokens before the ids of `tokenizer(text)`, in which text follows the BOS.
                    at_start = at_start or next_virtual > 0
                elif isinstance(piece, Control):
                    ids.append(piece.id)
                    at_start = self._tokenization.opens_after_control
                elif isinstance(piece, int):
                    ids.append(piece)
                    at_start = False
                elif isinstance(piece, Virtual):
                    count = self._virtual_tokens if piece.count is None else piece.count
                    ids += range(self._vocab_size + next_virtual, self._vocab_size + next_virtual + count)
                    next_virtual += count
                    at_start = False
        return ids, spans + [(0, 0)] * (len(ids) - len(spans)), cuts[:-1]

    def _encoded(self, run: str, at_start: bool, *, aligned: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if aligned:
            return self._tokenization.aligned(run, opens=at_start)
        return self._tokenization.opening(run) if at_start else self._tokenization.continuation(run), []

    def _bos(self) -> int:
        if self._tokenizer.bos_token_id is None:
            raise ConfigError("the template has <bos>, but the tokenizer has no BOS")
        return self._tokenizer.bos_token_id


def _within(spans: Sequence[tuple[int, int]], begin: int, length: int, skipped: int) -> list[tuple[int, int]]:
    """What of a field each span covers; (0, 0) for nothing.

    Args:
      spans: characters (from, to) of a text.
      begin, length: the characters of the text that are the field's.
      skipped: characters of the field before those.
    """
    clipped = [(max(first - begin, 0), min(last - begin, length)) for first, last in spans]
    return [(first + skipped, last + skipped) if last > first else (0, 0) for first, last in clipped]
