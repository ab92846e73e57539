"""Encodes records as token ids, some of them virtual, according to a template."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.both_sides import with_closing
from spt_jax.data.chats import ChatTemplate, Turn, turns_after, turns_of
from spt_jax.data.examples import Example
from spt_jax.data.pairs import separated
from spt_jax.data.pieces import PieceEncoder, after_cut
from spt_jax.data.reading import Spans
from spt_jax.data.sequences import form_of
from spt_jax.data.shortening import shorten, shortened
from spt_jax.data.shots import with_shots
from spt_jax.data.task import prompt_index, task_of
from spt_jax.data.templates import MESSAGES, Control, Cut, Field, Piece, Plain, Template, Text, parse
from spt_jax.data.tokenization import check_ids, tokenization_of
from spt_jax.data.turns import around_chat, check_turns, template_turns
from spt_jax.errors import ConfigError, DataError
from spt_jax.models.layout import Layout

# Records whose texts are given to the tokenizer together.
_TOGETHER = 1024


class Encoder:
    """Turns records into examples for one tokenizer, vocabulary and template.

    Attributes:
      template: the template.
      max_length: the maximum number of tokens of an example.
      shots: solved records that precede each prompt; in a chat, as separate turns.
      form: the form of the base's sequences.
      end_ids: the ids that end a target: EOS, and in a chat also the tokens that end an assistant turn.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_length: int,
        shots: Sequence[Mapping[str, Any]] = (),
        layout: Layout | None = None,
    ):
        """Prepares the template.

        Args:
          template: as in the attributes; so are `max_length` and `shots`.
          tokenizer: that of the base.
          vocab_size: the number V of the base's embeddings; virtual token i has the id V + i.
          max_length: see `template`.
          shots: see `template`.
          layout: that of the base; None for that of any causal base.

        Raises:
          ConfigError: the template is not compatible with the tokenizer, the shots or the base.
        """
        self.template = template
        self.form = form_of(tokenizer, layout)
        self._task = task_of(template)
        self.max_length = max_length
        self.shots = shots
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        is_chat = template.chat or template.is_conversation
        self._chat = ChatTemplate(tokenizer)
        self._turns = functools.partial(template_turns, template, shots)
        self._around = functools.partial(around_chat, template, tokenizer.bos_token_id)
        opening = {"adds_bos": not is_chat, "bos_id": self.form.bos_id, "new_tokens": template.new_tokens}
        self._pieces = PieceEncoder(tokenizer, vocab_size, template.virtual_tokens, **opening)
        self._virtual, self._opens = (template.virtual_tokens, len(template.new_tokens)), not template.continues
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        check_turns(template, tokenizer, shots, self._task.has_head)
        written = parse(self.form.marked(template.prompt))
        front = (
            self._rendered(self._turns(None))
            if template.chat
            else with_shots(template, shots, written, self._ids, self.form.answer_mask)
        )
        front = separated(front, self.form.pairs) if self.form.encodes else front
        self._prompt: list[Piece | int] = with_closing(front, self.form.closing, self.form.decodes)
        turn_ends = self._chat.turn_ends(self._turns(None) if template.chat else []) if is_chat else []
        self.end_ids = tuple(sorted({*self._eos, *turn_ends}))
        choices = [self._target({template.label_field: text}, ends=False) for text in template.verbalizers.values()]
        self._choices = [np.asarray(choice, np.int32) for choice in choices]
        for choice in self._choices:
            check_ids(tokenizer, choice, vocab_size)
        self.form.check(template, self._task.has_head, self._choices)

    def encode(self, record: Mapping[str, Any], index: int) -> Example:
        """Returns the example of one record.

        Args:
          record: the record.
          index: its number from 0.

        Raises:
          DataError: a field is missing, the label has no verbalizer, or the example is too long.
        """
        example = self._encode(record, index)
        try:
            check_ids(self._tokenizer, example.ids, self._vocab_size, *self._virtual)
        except DataError as error:
            raise DataError(f"record {index + 1}: {error}") from error
        if example.length <= self.max_length:
            return example
        return shortened(self.template, record, index, self._encode, self.max_length)

    def encode_all(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Returns the examples of all records, numbered from 0, each with the index of its task's prompt.

        Args:
          records: the records.

        Raises:
          DataError: as in `encode`.
        """
        return list(self.encode_each(records))

    def encode_each(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
        """Yields what `encode_all` returns. The tokenizer gets the texts of many records together.

        Args:
          records: the records.

        Yields:
          The example of each record.

        Raises:
          DataError: as in `encode`.
        """
        following, index = iter(records), 0
        while chunk := list(itertools.islice(following, _TOGETHER)):
            with self._pieces.prepared(self._texts(chunk, index), spans=self.template.reads is not None):
                examples = [self.encode(record, number) for number, record in enumerate(chunk, index)]
            for record, example in zip(chunk, examples, strict=True):
                prompt = 0 if self.template.task is None else prompt_index(self.template, record, example.index)
                yield example if prompt == 0 else dataclasses.replace(example, prompt=prompt)
            index += len(chunk)

    def _texts(self, records: Sequence[Mapping[str, Any]], first: int) -> list[str]:
        """Returns the texts that the tokenizer will be given for records; none for those that are rendered as chats."""
        if self.template.chat or self.template.is_conversation:
            return []
        targets = [] if self._choices or self._task.has_head else [self.template.target]
        pieces = [parse(target) for target in [*targets, *([self.template.rejected] if self._task.pairs else [])]]
        names = self.template.fields if pieces else self.template.prompt_fields
        texts: list[str] = []
        for number, record in enumerate(records):
            try:
                fields = self._fields(record, names, first + number)
            except DataError:  # raised again with what the record is encoded for
                break
            texts += self._pieces.texts(self._prompt, fields, opens=self._opens)
            for target in pieces:
                texts += self._pieces.texts(target, fields, opens=self.form.decodes)
        return texts

    def leads(self, examples: Sequence[Example]) -> int | list[int]:
        """Returns `head_length` of all examples; with tasks, that of the examples of each task.

        Args:
          examples: encoded records.
        """
        if self.template.task is None:
            return self.head_length(examples)
        by_task: list[list[Example]] = [[] for _ in self.template.tasks]
        for example in examples:
            by_task[example.prompt].append(example)
        return [self.head_length(group) for group in by_task]

    def prompt_ids(self, record: Mapping[str, Any], room: int = 0) -> np.ndarray:
        """Returns the ids of the prompt, to generate from. If a chat ends in an assistant turn, that turn is left out.

        Args:
          record: the record.
          room: the number of new tokens to leave room for. The template's `truncate` field, if there is one, is
            shortened until the prompt and the new tokens fit in `max_length`, or the field is empty. Without such a
            field, the prompt is not shortened.

        Raises:
          DataError: a field is missing or not text.
        """
        ids, most = self._prompt_ids(record), self.max_length - room
        if len(ids) <= most or self.template.truncate is None:
            return ids
        return self._prompt_ids(shorten(self.template, record, 0, lambda part: len(self._prompt_ids(part)) <= most))

    def _prompt_ids(self, record: Mapping[str, Any]) -> np.ndarray:
        if self.template.is_conversation:
            turns = turns_after(self._turns(None), record, 0)
            turns = turns[:-1] if turns[-1].is_answer else turns
            ids = self._ids(self._around(self._rendered(turns)), {}, opens=self._opens)
        else:
            names = [piece.name for piece in self._prompt if isinstance(piece, Field)]
            ids = self._ids(*self._filled(self._fields(record, names, 0)), opens=self._opens)
        check_ids(self._tokenizer, ids, self._vocab_size, *self._virtual)
        return np.asarray(ids, np.int32)

    def up_to_answer(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the record; if it is a chat, without the turns after the last assistant turn.

        Args:
          record: the record.
        """
        if not self.template.is_conversation:
            return record
        answers = [number for number, turn in enumerate(turns_of(record, 0), 1) if turn.is_answer]
        return {**record, MESSAGES: record[MESSAGES][: max(answers, default=0)]}

    def answers(self, record: Mapping[str, Any]) -> int:
        """Returns the number of answers of a record: the assistant turns of a chat, otherwise 1.

        Args:
          record: the record.
        """
        return sum(turn.is_answer for turn in turns_of(record, 0)) if self.template.is_conversation else 1

    def reference(self, record: Mapping[str, Any]) -> str:
        """Returns the text that should follow `prompt_ids`, without control tokens.

        Args:
          record: a record with its target.
        """
        if self.template.is_conversation:
            segments = self._chat.conversation(turns_after(self._turns(None), record, 0), self._eos)
            pieces = [segment.pieces for segment in segments if segment.predicted][-1]
            return "".join(piece.text for piece in pieces if isinstance(piece, Plain)).strip()
        return self._task.reference(self.template, record)

    def fixed_lead(self) -> np.ndarray:
        """Returns the leading ids that all prompts of this template share, whatever their fields; never a whole prompt.

        Text next to a field may merge with it, so it is not included.
        """
        if self.template.is_conversation or self.template.per_input or not self.form.shares:
            return np.zeros(0, np.int32)
        pieces = list(self._pieces.split_controls(self._prompt))
        first = next((i for i, piece in enumerate(pieces) if isinstance(piece, Field)), len(pieces))
        while 0 < first < len(pieces) and isinstance(pieces[first - 1], (Text, Plain)):
            first -= 1
        ids = np.asarray(self._ids(pieces[:first], {}, opens=self._opens), np.int32)
        # If fields may be empty, or there are none, the last id is left to the request.
        return ids[:-1] if all(isinstance(piece, Field) for piece in pieces[first:]) else ids

    def head_length(self, examples: Sequence[Example]) -> int:
        """Returns how many leading ids all examples share, independently of their fields; 0 if none can be shared.

        An id whose output predicts an example's first target is not counted: it stays in the rows.

        Args:
          examples: encoded records.
        """
        if not self.form.shares or self.template.per_input:
            return 0
        constant = list(itertools.takewhile(lambda piece: not isinstance(piece, Field), self._prompt))
        head = np.asarray(self._ids(constant, {}, opens=self._opens), np.int32)
        length = len(head)
        for example in examples:
            shared = min(length, len(example.ids), example.first_target - 1)
            differs = np.flatnonzero(example.ids[:shared] != head[:shared])
            length = int(differs[0]) if len(differs) else shared
        return max(length, 0)

    def _encode(self, record: Mapping[str, Any], index: int) -> Example:
        encode = self._task.encode_chat if self.template.is_conversation else self._task.encode
        example = encode(self, record, index)
        if Cut() in self._prompt and not self.form.decodes:
            filled = self._filled(self._fields(record, self.template.prompt_fields, index))
            (second,) = self._pieces.aligned(*filled, opens=self._opens)[2]
            example = dataclasses.replace(example, second_at=second)
        example = example.reading(causal=self.form.causal) if self.template.per_input else example
        return example.decoded(self.form.closing[-1]) if self.form.decodes else example

    @property
    def facts(self) -> dict[str, Any]:
        """All that examples depend on beside the records, as plain JSON."""
        return {
            "template": dataclasses.asdict(self.template),
            "verbalizers": list(self.template.verbalizers),
            "shots": [dict(shot) for shot in self.shots],
            "vocab_size": self._vocab_size,
            "max_length": self.max_length,
            "form": dataclasses.asdict(self.form),
            "tokenizer": tokenization_of(self._tokenizer).digest,
        }

    @property
    def choices(self) -> tuple[np.ndarray, ...]:
        """The ids of each verbalizer, each a continuation of a prompt."""
        return tuple(self._choices)

    def encode_prompt(self, record: Mapping[str, Any], index: int) -> list[int]:
        """Returns the ids of the prompt of a record that also has the fields of the target.

        Args:
          record: the record.
          index: its number from 0, for messages.

        Raises:
          DataError: a field is missing.
        """
        return self._ids(*self._filled(self._fields(record, self.template.fields, index)), opens=self._opens)

    def encode_target(self, record: Mapping[str, Any], index: int, target: str | None = None) -> list[int]:
        """Returns the ids of the target, including those that end it.

        Args:
          record: the record.
          index: its number from 0, for messages.
          target: a template in place of that of the target, such as that of the rejected answer.

        Raises:
          DataError: a field is missing.
        """
        return self._target(self._fields(record, self.template.fields, index), target)

    def encode_read(self, record: Mapping[str, Any], index: int) -> tuple[list[int], Spans]:
        """Returns the ids of the prompt, and for each the characters that it covers of the field `reads`, or (0, 0).

        Args:
          record: the record.
          index: its number from 0, for messages.

        Raises:
          DataError: a field is missing.
        """
        filled = self._filled(self._fields(record, self.template.prompt_fields, index))
        ids, spans, _ = self._pieces.aligned(*filled, opens=self._opens, field=self.template.reads)
        return ids, spans

    def _fields(self, record: Mapping[str, Any], names: Sequence[str], index: int) -> dict[str, str]:
        return {name: self._task.field(self.template, record, name, index) for name in names}

    def read_text(self, record: Mapping[str, Any], first: int, last: int) -> str:
        """Returns the text of the field that a head reads from its token number `first` to `last`, inclusive.

        Args:
          record: the record.
          first: the first token.
          last: the last token.
        """
        text = self._task.field(self.template, record, self.template.reads or "", 0)
        spans = [span for span in self.encode_read(record, 0)[1] if any(span)]
        return text[spans[first][0] : spans[last][1]].strip()

    def prompt_ids_around(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """Returns the prompt with real token ids in place of its only field, and the position where these begin.

        Args:
          ids: token ids in [0, V).
        """
        at = next(i for i, piece in enumerate(self._prompt) if isinstance(piece, Field))
        front, rest = [*self._prompt[:at], *ids], self._prompt[at + 1 :]
        whole = self._ids([*front, *rest], {}, opens=self._opens)
        return np.asarray(whole, np.int32), len(self._ids(front, {}, opens=self._opens)) - len(ids)

    def with_any_label(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a record to predict, with an arbitrary label in place of the unknown one.

        Args:
          record: a record without its target.

        Raises:
          DataError: the field that the head reads is empty.
        """
        return self._task.with_any_label(self.template, record)

    def _target(self, fields: Mapping[Any, str], target: str | None = None, *, ends: bool = True) -> list[int]:
        """Returns the ids of the target, or of another template, with those that end it if `ends`."""
        pieces = parse(self.template.target if target is None else target)
        if not self.template.chat:
            # The decoder's tokens are a sequence of their own.
            return self.form.answer(self._ids(pieces, fields, opens=self.form.decodes)) + (self._eos if ends else [])
        content = [Plain(fields[piece.name]) if isinstance(piece, Field) else piece for piece in pieces]
        answer = self._chat.answer(self._turns(None), content)
        end = (answer.end or [Control(id_) for id_ in self._eos]) if ends else []
        return self._pieces.after(self._prompt, [*answer.words, *end])

    def _ids(self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool) -> list[int]:
        return self._pieces.aligned(pieces, fields, opens=opens)[0]

    def _rendered(self, turns: Sequence[Turn]) -> list[Piece]:
        pieces = self._chat.prompt(turns)
        return after_cut(pieces) if self.template.continues else pieces

    def _filled(self, fields: Mapping[str, str]) -> tuple[Sequence[Piece | int], Mapping[str, str]]:
        """Returns the pieces of the prompt, and the fields that still have to be filled in."""
        return (self._rendered(self._turns(fields)), {}) if self.template.chat else (self._prompt, fields)

    def encode_conversation(self, record: Mapping[str, Any], index: int) -> Example:
        """Encodes a chat whose assistant turns the model learns to predict, including the tokens that end them.

        Args:
          record: a record with `messages`.
          index: its number from 0, for messages.

        Returns:
          The example, whose predicted ids are those of the assistant turns.

        Raises:
          DataError: the record is not a chat, or it has no assistant turn.
        """
        turns = turns_after(self._turns(None), record, index)
        try:
            first, *others = self._chat.conversation(turns, self._eos)
        except (ConfigError, DataError) as error:
            raise DataError(f"record {index + 1}: {error}") from error
        pieces = self._around(after_cut(first.pieces) if self.template.continues else first.pieces)
        for segment in others:
            pieces += [Cut(), *segment.pieces]
        ids, _, cuts = self._pieces.aligned(pieces, {}, opens=self._opens)
        predicted, edges = np.zeros(len(ids), bool), [*cuts, len(ids)]
        for segment, begin, end in zip(others, edges[:-1], edges[1:], strict=True):
            predicted[begin:end] = segment.predicted
        if not predicted.any():
            raise DataError(f"record {index + 1}: there is no assistant turn to learn from")
        return Example(np.asarray(ids, np.int32), predicted, (), 0, index)


def encoder_for(
    base: FrozenBase,
    template: Template,
    *,
    taken: int = 0,
    max_length: int | None = None,
    shots: Sequence[Mapping[str, Any]] = (),
) -> Encoder:
    """Returns an encoder of records for a base.

    Args:
      base: the frozen base.
      template: the template.
      taken: the number of positions that the soft prompt's prefix takes before each record.
      max_length: the maximum number of tokens of an example; at most, and by default, the positions that are left.
      shots: solved records that precede each prompt.

    Raises:
      ConfigError: the template is not compatible with the tokenizer, the shots or the base.
    """
    positions = base.layout.max_positions - taken
    limit = positions if max_length is None else min(max_length, positions)
    return Encoder(template, base.tokenizer, base.layout.vocab_size, limit, shots, base.layout)
