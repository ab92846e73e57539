"""Records to token ids, some of them virtual, as a template reads them."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.data.chats import ChatTemplate, messages_of
from spt_jax.data.reading import answer_text, span_reads, tag_reads, words_of
from spt_jax.data.templates import MESSAGES, Bos, Field, Piece, Plain, Template, Text, Virtual, parse
from spt_jax.data.tokenization import tokenization_of
from spt_jax.errors import ConfigError, DataError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as ids.

    ids: the prompt, and for a generation target (no choices) the target behind it.
    predicted: True for those ids that the model shall predict.
    choices: for classification, the ids of every verbalizer, each a continuation of `ids`.
    label: the index of the right choice, 0 where there is none.
    index: the record's number in its source.
    prompt: which of several soft prompts it is for.
    reads: for a task head, the positions whose hidden states it reads, ascending.
    classes: the right class at each of them.
    """

    ids: np.ndarray
    predicted: np.ndarray
    choices: tuple[np.ndarray, ...]
    label: int
    index: int
    prompt: int = 0
    reads: np.ndarray | None = None
    classes: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sequence: the context and its longest continuation."""
        return len(self.ids) + max((len(choice) for choice in self.choices), default=0)

    @property
    def first_target(self) -> int:
        """The position behind the first token whose hidden state is needed."""
        if self.reads is not None:
            return int(self.reads[0]) + 1
        return len(self.ids) if self.choices else int(np.argmax(self.predicted))

    def as_target(self) -> "Example":
        """The same example with the right choice, if it has choices, as its one target."""
        if not self.choices:
            return self
        right = self.choices[self.label]
        predicted = np.arange(len(self.ids) + len(right)) >= len(self.ids)
        return dataclasses.replace(self, ids=np.concatenate([self.ids, right]), predicted=predicted, choices=())


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of examples, by which two processes tell that they read the same."""
    sha = hashlib.sha256()
    for example in examples:
        for value in dataclasses.astuple(example):
            for part in value if isinstance(value, tuple) else (value,):
                sha.update(b"-" if part is None else np.asarray(part).tobytes())
    return sha.hexdigest()


# What stands behind each solved example of a context, and ends an answer that follows them.
SEPARATOR = "\n\n"


class Encoder:
    """Turns records into examples for one tokenizer, vocabulary and template.

    shots: solved records that stand in front of every prompt, as turns of their own in a chat.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Any,
        vocab_size: int,
        max_length: int,
        shots: Sequence[Mapping[str, Any]] = (),
    ):
        self.template = template
        self.max_length = max_length
        self.shots = shots
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokenization = tokenization_of(tokenizer)
        specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._chat = ChatTemplate(tokenizer, self._special)
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if template.chat and template.is_conversation:
            raise ConfigError("data.chat renders a prompt and a target as a chat; {messages} is one already")
        if (template.chat or template.is_conversation) and not tokenizer.chat_template:
            raise ConfigError("this base's tokenizer has no chat template")
        if shots and (template.is_conversation or template.virtual_tokens or template.head != "language_model"):
            raise ConfigError("solved examples stand in front of a written prompt, with neither {messages} nor a head")
        if template.chat:
            self._prompt, self._end = self._chat_pieces(template)
        else:
            self._prompt, self._end = self._with_shots(parse(template.prompt)), self._eos
        self._choices = (
            [np.asarray(self._target({template.label_field: text}), np.int32) for text in template.verbalizers.values()]
            if template.verbalizers
            else []
        )
        self._classes = list(template.verbalizers)
        if any(len(choice) == 0 for choice in self._choices):
            raise ConfigError("a verbalizer without tokens: every class needs some text")
        if len({tuple(choice) for choice in self._choices}) < len(self._choices):
            raise ConfigError(f"two verbalizers have the same token ids: {dict(template.verbalizers)}")

    def encode(self, record: Mapping[str, Any], index: int) -> Example:
        """One record.

        Raises:
          DataError: a field is absent, the label has no verbalizer, or the example cannot fit.
        """
        example = self._encode(record, index)
        if example.length <= self.max_length:
            return example
        field = self.template.truncate
        if field is None:
            raise DataError(
                f"record {index + 1}: {example.length} tokens, at most {self.max_length} fit; name a field that may be"
                " shortened (data.truncate), or raise data.max_length"
            )
        value = str(record[field])
        low, high = 0, len(value)  # the most characters that fit, by bisection
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._encode({**record, field: self._shortened(value, middle)}, index).length <= self.max_length
            low, high = (middle, high) if fits else (low, middle - 1)
        example = self._encode({**record, field: self._shortened(value, low)}, index)
        if example.length > self.max_length:
            raise DataError(
                f"record {index + 1}: {example.length} tokens even without its field {field!r}; at most"
                f" {self.max_length} fit"
            )
        return example

    def encode_all(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Every record, numbered from 0, with its task's prompt."""
        examples = [self.encode(record, index) for index, record in enumerate(records)]
        if self.template.task is None:
            return examples
        prompts = [self._task(record, index) for index, record in enumerate(records)]
        return [dataclasses.replace(e, prompt=prompt) for e, prompt in zip(examples, prompts, strict=True)]

    def leads(self, examples: Sequence[Example]) -> int | list[int]:
        """`head_length` of all examples, or of those of each task."""
        if self.template.task is None:
            return self.head_length(examples)
        by_task: list[list[Example]] = [[] for _ in self.template.tasks]
        for example in examples:
            by_task[example.prompt].append(example)
        return [self.head_length(own) for own in by_task]

    def prompt_ids(self, record: Mapping[str, Any]) -> np.ndarray:
        """The prompt alone, to generate from. A chat's last assistant turn is left for the model to say."""
        if self.template.is_conversation:
            messages = messages_of(record, 0)
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return np.asarray(self._conversation(messages, add_generation_prompt=True)[0], np.int32)
        names = [piece.name for piece in self._prompt if isinstance(piece, Field)]
        return np.asarray(self._ids(self._prompt, self._fields(record, names, 0), opens=True), np.int32)

    def reference(self, record: Mapping[str, Any]) -> str:
        """What the model should say after `prompt_ids`, as text."""
        if self.template.is_conversation:
            return str(messages_of(record, 0)[-1]["content"])
        if self.template.head == "span":
            return answer_text(record[self.template.label_field or ""])
        pieces = parse(self.template.target)
        return "".join(str(record[p.name]) if isinstance(p, Field) else getattr(p, "text", "") for p in pieces).strip()

    def fixed_lead(self) -> np.ndarray:
        """Leading ids that every prompt of this template begins with, whatever its fields hold; never all of them.

        Text that touches a field may merge with it, and is not among them.
        """
        if self.template.is_conversation:
            return np.zeros(0, np.int32)
        pieces = list(self._split_specials(self._prompt))
        first = next((i for i, piece in enumerate(pieces) if isinstance(piece, Field)), len(pieces))
        while 0 < first < len(pieces) and isinstance(pieces[first - 1], (Text, Plain)):
            first -= 1
        ids = np.asarray(self._ids(pieces[:first], {}, opens=True), np.int32)
        # Where fields may be empty, or are none, the last id is left to the request.
        return ids[:-1] if all(isinstance(piece, Field) for piece in pieces[first:]) else ids

    def head_length(self, examples: Sequence[Example]) -> int:
        """How many leading ids are the same for all examples and independent of their fields.

        The last of them stays in the rows where its output predicts a first target.
        """
        constant = []
        for piece in self._prompt:
            if isinstance(piece, Field):
                break
            constant.append(piece)
        head = np.asarray(self._ids(constant, {}, opens=True), np.int32)
        length = len(head)
        for example in examples:
            shared = min(length, len(example.ids), example.first_target - 1)
            differs = np.flatnonzero(example.ids[:shared] != head[:shared])
            length = int(differs[0]) if len(differs) else shared
        return max(length, 0)

    def _shortened(self, value: str, characters: int) -> str:
        return value[:characters] if self.template.keep == "start" else value[len(value) - characters :]

    def _encode(self, record: Mapping[str, Any], index: int) -> Example:
        if self.template.is_conversation:
            ids, predicted = self._conversation(messages_of(record, index), add_generation_prompt=False)
            if not any(predicted):
                raise DataError(f"record {index + 1}: no assistant turn to learn from")
            return Example(np.asarray(ids, np.int32), np.asarray(predicted), (), 0, index)
        fields = self._fields(record, self.template.fields, index)
        if self.template.reads is not None:
            return self._read(record, fields, index)
        prompt = self._ids(self._prompt, fields, opens=True)
        if self.template.verbalizers:
            label = self._label(record, index)
            if self.template.head == "classification":
                last = np.asarray([len(prompt) - 1], np.int32)
                ids = np.asarray(prompt, np.int32)
                return Example(
                    ids, np.zeros(len(ids), bool), (), label, index, reads=last, classes=np.asarray([label], np.int32)
                )
            return Example(
                np.asarray(prompt, np.int32), np.zeros(len(prompt), bool), tuple(self._choices), label, index
            )
        target = self._target(fields) + self._end
        predicted = np.arange(len(prompt) + len(target)) >= len(prompt)
        if not len(prompt):
            predicted[0] = False  # nothing stands before the first id to predict it from
        return Example(np.asarray(prompt + target, np.int32), predicted, (), 0, index)

    def _fields(self, record: Mapping[str, Any], names: Sequence[str], index: int) -> dict[str, str]:
        for name in names:
            if record.get(name) is None:
                raise DataError(f"record {index + 1}: no field {name!r}; {did_you_mean(name, record)}")
        words = {name: " ".join(words_of(record[name])) for name in names if self._has_words(name)}
        return {name: words.get(name, str(record[name])) for name in names}

    def _has_words(self, name: str) -> bool:
        return self.template.head == "tagging" and name == self.template.reads

    def _read(self, record: Mapping[str, Any], fields: Mapping[str, str], index: int) -> Example:
        """An example for a head that reads a field."""
        name, label = self.template.reads or "", record[self.template.label_field or ""]
        ids, spans = self._aligned(self._prompt, fields, opens=True, field=name)
        try:
            if self.template.head == "tagging":
                reads, classes = tag_reads(words_of(record[name]), words_of(label), self._classes, spans)
            else:
                reads, classes = span_reads(fields[name], label, spans)
        except DataError as error:
            raise DataError(f"record {index + 1}: {error}") from error
        return Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), (), 0, index, reads=reads, classes=classes)

    def read_text(self, record: Mapping[str, Any], first: int, last: int) -> str:
        """The part of a span head's field from its token number `first` to `last`."""
        fields = self._fields(record, self.template.prompt_fields, 0)
        text = fields[self.template.reads or ""]
        spans = [
            span for span in self._aligned(self._prompt, fields, opens=True, field=self.template.reads)[1] if any(span)
        ]
        return text[spans[first][0] : spans[last][1]].strip()

    def prompt_ids_around(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """The prompt with real token ids in the place of its one field, and where these begin."""
        at = next(i for i, piece in enumerate(self._prompt) if isinstance(piece, Field))
        front, rest = [*self._prompt[:at], *ids], self._prompt[at + 1 :]
        whole = self._ids([*front, *rest], {}, opens=True)
        return np.asarray(whole, np.int32), len(self._ids(front, {}, opens=True)) - len(ids)

    def with_any_label(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record to ask about, with some label in the place of the one that is not known.

        Raises:
          DataError: there is nothing to read.
        """
        name = self.template.label_field or ""
        if self.template.reads is None:
            return {**record, name: self._classes[0]}
        words = self._fields(record, [self.template.reads], 0)[self.template.reads].split()
        if not words:
            raise DataError(f"the field {self.template.reads!r} is empty, so that there is nothing to read")
        return {**record, name: words[0] if self.template.head == "span" else [self._classes[0]] * len(words)}

    def _task(self, record: Mapping[str, Any], index: int) -> int:
        name = str(self._fields(record, [self.template.task or ""], index)[self.template.task or ""])
        if name not in self.template.tasks:
            raise DataError(
                f"record {index + 1}: there is no prompt for the task {name!r};"
                f" {did_you_mean(name, self.template.tasks)}"
            )
        return self.template.tasks.index(name)

    def _label(self, record: Mapping[str, Any], index: int) -> int:
        value = str(record[self.template.label_field or ""])
        if value not in self._classes:
            raise DataError(
                f"record {index + 1}: label {value!r} has no verbalizer; {did_you_mean(value, self._classes)}"
            )
        return self._classes.index(value)

    def _target(self, fields: Mapping[Any, str]) -> list[int]:
        return self._ids(parse(self.template.target), fields, opens=False)

    def _ids(self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool) -> list[int]:
        return self._aligned(pieces, fields, opens=opens)[0]

    def _aligned(
        self, pieces: Sequence[Piece | int], fields: Mapping[Any, str], *, opens: bool, field: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of pieces. Text and fields that touch are encoded as one text.

        opens: the pieces start the sequence, so that BOS goes first unless a piece says where.
        field: one of the fields, for which the second result says which of its characters each id covers.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        run, at_start, next_virtual, begin = "", opens, 0, None
        if opens and Bos() not in pieces and self._adds_bos:
            ids.append(self._tokenizer.bos_token_id)
        for piece in [*self._split_specials(pieces), Text("")]:
            if isinstance(piece, Field):
                begin = len(run) if piece.name == field else begin
                run += str(fields[piece.name])
            elif isinstance(piece, (Text, Plain)) and piece.text:
                run += piece.text
            else:
                if begin is not None:
                    more, covered = self._tokenization.aligned(run, opens=at_start)
                    spans += [(0, 0)] * (len(ids) - len(spans)) + _within(covered, begin, len(fields[field or ""]))
                    ids += more
                elif run:
                    ids += self._tokenization.opening(run) if at_start else self._tokenization.continuation(run)
                if run:
                    at_start, run, begin = False, "", None
                if isinstance(piece, Bos):
                    ids.append(self._bos())
                elif isinstance(piece, int):
                    ids.append(piece)
                    at_start = False
                elif isinstance(piece, Virtual):
                    count = self.template.virtual_tokens if piece.count is None else piece.count
                    ids += range(self._vocab_size + next_virtual, self._vocab_size + next_virtual + count)
                    next_virtual += count
                    at_start = False
        return ids, spans + [(0, 0)] * (len(ids) - len(spans))

    def _solved(self, record: Mapping[str, Any], side: str) -> list[Piece]:
        """A side of the template with the record's fields in their places, a class as its verbalizer."""
        known = dict(record)
        if self.template.verbalizers:
            name = self.template.label_field or ""
            label = str(record[name])
            if label not in self.template.verbalizers:
                hint = did_you_mean(label, self.template.verbalizers)
                raise DataError(f"a solved example's label {label!r} has no verbalizer; {hint}")
            known[name] = self.template.verbalizers[label]
        return [Plain(str(known[p.name])) if isinstance(p, Field) else p for p in parse(side)]

    def _with_shots(self, prompt: Sequence[Piece]) -> list[Piece | int]:
        """The prompt behind the solved examples, whose targets have the ids that they have alone."""
        pieces: list[Piece | int] = []
        for record in self.shots:
            question = [piece for piece in self._solved(record, self.template.prompt) if piece != Bos()]
            answer = self._ids(self._solved(record, self.template.target), {}, opens=False)
            pieces += [*question, *answer, Text(SEPARATOR)]
        front = 1 if prompt[:1] == [Bos()] else 0
        return [*prompt[:front], *pieces, *prompt[front:]]

    def _bos(self) -> int:
        if self._tokenizer.bos_token_id is None:
            raise ConfigError("the template has <bos>, but the tokenizer has no BOS")
        return self._tokenizer.bos_token_id

    def _split_specials(self, pieces: Sequence[Piece | int]) -> Iterator[Piece | int]:
        """Cuts literal text at the tokenizer's control tokens, which become ids."""
        for piece in pieces:
            if not isinstance(piece, Text) or self._special is None:
                yield piece
                continue
            last = 0
            for match in self._special.finditer(piece.text):
                yield from [Text(piece.text[last : match.start()])] if match.start() > last else []
                yield self._tokenizer.convert_tokens_to_ids(match[0])
                last = match.end()
            yield from [Text(piece.text[last:])] if piece.text[last:] else []

    def _chat_pieces(self, template: Template) -> tuple[list[Piece | int], list[int]]:
        roles = ["system"] if template.system is not None else []
        contents: list[list[Piece]] = [[Text(template.system)]] if template.system is not None else []
        for record in self.shots:
            roles += ["user", "assistant"]
            contents += [self._solved(record, template.prompt), self._solved(record, template.target)]
        roles.append("user")
        contents.append(parse(template.prompt))
        texts = self._chat.rendered(roles, add_generation_prompt=True)
        front, texts[0] = self._chat.without_bos(texts[0])
        pieces: list[Piece | int] = [*front]
        for text, content in zip(texts, [*contents, []], strict=True):
            pieces += [Text(text), *content] if text else content
        end, _ = self._chat.turn_end(self._chat.rendered([*roles, "assistant"], add_generation_prompt=False)[-1])
        return pieces, end or self._eos

    def _conversation(
        self, messages: list[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids of a chat, and which of them an assistant says (the end of its turn included)."""
        roles = tuple(str(message["role"]) for message in messages)
        texts = self._chat.rendered(roles, add_generation_prompt)
        before, after = self._around_messages()
        front, texts[0] = self._chat.without_bos(texts[0])
        ids = self._ids([*front, *before, Text(texts[0])], {}, opens=True)
        predicted = [False] * len(ids)
        for message, text in zip(messages, texts[1:], strict=True):
            spoken = self._tokenization.continuation(str(message["content"]))
            is_target = message["role"] == "assistant"
            end, rest = self._chat.turn_end(text) if is_target else ([], text)
            following = self._ids([Text(rest)], {}, opens=False)
            ids += [*spoken, *end, *following]
            predicted += [is_target] * len([*spoken, *end]) + [False] * len(following)
        tail = self._ids(after, {}, opens=False)
        return ids + tail, predicted + [False] * len(tail)

    def _around_messages(self) -> tuple[list[Piece], list[Piece]]:
        pieces = parse(self.template.prompt)
        at = pieces.index(Field(MESSAGES))
        return pieces[:at], pieces[at + 1 :]


def _within(spans: Sequence[tuple[int, int]], begin: int, length: int) -> list[tuple[int, int]]:
    """What of a part of a text, `length` characters from `begin` on, each span covers; (0, 0) for nothing."""
    clipped = [(max(first - begin, 0), min(last - begin, length)) for first, last in spans]
    return [(first, last) if last > first else (0, 0) for first, last in clipped]
